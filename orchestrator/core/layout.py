"""What one generation consists of: devices, placement, pools and the extents every pool must hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal
from weakref import ref

from ...planners.placement import Placement
from ...workers.generation import TRUNK_KEY, ExchangeKind, expert_key, kv_key
from ...workers.pages.backend import PoolGeometry
from ...workers.pages.store import table_pages
from ...workers.pages.table import ExtentRequest
from ..sizing import MemoryPlan
from .inventory import ALIKE, CPU, Inventory, Kind

MemoryMode = Literal["shared", "separate"]
_NODE = "node/"


@dataclass(frozen=True, slots=True)
class Seat:
    """One device of the deployment: its name, the node it belongs to, and what kind it is of."""

    device: str
    node: str
    kind: Kind = CPU


@dataclass(frozen=True)
class Layout:
    """One complete configuration. Rank ``r`` sits at ``seats[r]`` and is device ``r`` of the placement.

    What follows from it is found once: every decision of the controller asks for all of it, several times.

    Parameters
    ----------
    memory_mode : {"shared", "separate"}
        ``shared``: the devices of a node share its memory, as CPUs do: one pool per node, in which an expert has one
        copy however many workers map it. ``separate``: every device has a pool of its own; the node's pool holds
        what its workers share (trunk, exchange).
    exchange_pages : int
        Pages of the exchange region in the first node's pool; 0 unless the exchange is ``shared``.
    reserved_experts : tuple of int
        By rank: physical experts, summed over layers, for which a device keeps room beside its KV cache, so that
        experts can move to it later; empty for none.
    started : tuple of (str, int)
        Nodes, and the pages that their pools are started with: a pool never grows, whatever comes to its node, and a
        page costs memory only once it is used.
    ledger_record_bytes : int
        See `OwnerConfig`.
    length_blocks : int
        KV blocks of one sequence of full length, which every device has as long as no node is lost.
    inventory : Inventory
        Devices that there may be.
    """

    seats: tuple[Seat, ...]
    placement: Placement
    memory: MemoryPlan
    memory_mode: MemoryMode
    exchange: ExchangeKind
    exchange_pages: int = 0
    reserved_experts: tuple[int, ...] = ()
    started: tuple[tuple[str, int], ...] = ()
    ledger_record_bytes: int = 0
    length_blocks: int = 0
    inventory: Inventory = ALIKE

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """Devices by rank."""
        return tuple(seat.device for seat in self.seats)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Nodes in the order of their first seat."""
        return tuple(dict.fromkeys(seat.node for seat in self.seats))

    def device_pool(self, rank: int) -> str:
        """Pool that holds this rank's experts and KV cache."""
        return self._device_pools[rank]

    @cached_property
    def _device_pools(self) -> tuple[str, ...]:
        shared = self.memory_mode == "shared"
        return tuple(node_pool(seat.node) if shared else own_pool(seat) for seat in self.seats)

    @cached_property
    def pools(self) -> Mapping[str, str]:
        """Every pool and its node."""
        pools = {node_pool(node): node for node in self.nodes}
        pools.update({pool: seat.node for pool, seat in zip(self._device_pools, self.seats, strict=True)})
        return MappingProxyType(pools)

    def experts_of(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(MoE layer, expert) of every physical expert on this rank, by layer and slot."""
        return self._experts_R[rank]

    @cached_property
    def _experts_R(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        on = self.placement.experts_LD
        ranks = range(len(self.seats))
        return tuple(tuple((n, expert) for n, layer in enumerate(on) for expert in layer[rank]) for rank in ranks)

    def kv_blocks(self, rank: int) -> int:
        """KV blocks that this rank has beside its experts and the room kept for others."""
        reserved = self.reserved_experts[rank] if self.reserved_experts else 0
        return self.memory.kv_blocks(max(len(self.experts_of(rank)), reserved), self.device_pages(self.seats[rank]))

    def device_pages(self, seat: Seat) -> int:
        """Pages that a device may fill with experts and KV."""
        return int(self.memory.device_pages * seat.kind.memory_part)

    def kv_blocks_coming_from(self, old: Layout, device: str) -> int:
        """KV blocks that a device may have while it goes from ``old`` to this layout, in both of which it is."""
        rank = self.devices.index(device)
        if self.memory_mode == "shared":
            keeps = self._fits_beside_kv_of(old, self.device_pool(rank))
            return old.kv_blocks(old.devices.index(device)) if keeps else self.kv_blocks(rank)
        before = old.experts_of(old.devices.index(device))
        both = len({*self.experts_of(rank), *before})
        pages = [layout.device_pages(self.seats[rank]) for layout in (self, old)]
        return min(self.kv_blocks(rank), *(self.memory.kv_blocks(both, most) for most in pages))

    def lacks_room_after(self, old: Layout) -> str:
        """A device to which what both have there leaves less KV than it has now and one sequence needs; or empty."""
        for device in self.devices:
            if device in old.devices:
                least = min(self.length_blocks, old.kv_blocks(old.devices.index(device)))
                if self.kv_blocks_coming_from(old, device) < least:
                    return device
        return ""

    def _fits_beside_kv_of(self, old: Layout, pool: str) -> bool:
        """Whether what KV ``old`` has in a pool may stay until this layout serves: with the experts of both that is no
        more than one of them takes. Alone on a node a deployment's pool has every expert already."""
        known = self._beside.get(pool)
        if known is None or known[0]() is not old:
            before, after = old.experts_in(pool), self.experts_in(pool)
            kv_before, kv_after = old.kv_in(pool), self.kv_in(pool)
            most = max(self._pages(before, kv_before), self._pages(after, kv_after))
            known = self._beside[pool] = ref(old), self._pages(before | after, {**kv_after, **kv_before}) <= most
        return known[1]

    @cached_property
    def _beside(self) -> dict[str, tuple[ref[Layout], bool]]:
        """By pool what was found last, and for which layout: every decision asks for it, for each device."""
        return {}

    def _pages(self, experts: Collection[tuple[int, int]], kv: Mapping[str, int]) -> int:
        return len(experts) * self.memory.expert_pages + sum(kv.values()) * self.memory.kv_block_pages

    def experts_in(self, pool: str) -> frozenset[tuple[int, int]]:
        """(MoE layer, expert) of all that a pool holds; it has one copy of each."""
        ranks = (rank for rank in range(len(self.seats)) if self.device_pool(rank) == pool)
        return frozenset(key for rank in ranks for key in self.experts_of(rank))

    def kv_coming_from(self, old: Layout, pool: str) -> dict[str, int]:
        """KV blocks in a pool by device just before this layout comes: leavers' and newcomers', too."""
        before, after = old.kv_in(pool), self.kv_in(pool)
        both = {d: min(before[d], self.kv_blocks_coming_from(old, d)) for d in before.keys() & after.keys()}
        return {**before, **after, **both}

    def kv_in(self, pool: str) -> dict[str, int]:
        """KV blocks in a pool by device."""
        ranks = (rank for rank in range(len(self.seats)) if self.device_pool(rank) == pool)
        return {self.seats[rank].device: self.kv_blocks(rank) for rank in ranks}

    def pool_pages(self, pool: str) -> int:
        """Pages of a pool, its page table and ledger included; those of a device alone never change."""
        if not is_node_pool(pool):
            return self.own_pool_pages(next(seat for seat in self.seats if own_pool(seat) == pool))
        return self._started.get(pool) or self.needed_pages(pool)

    @cached_property
    def _started(self) -> dict[str, int]:
        return {node_pool(node): pages for node, pages in self.started}

    def needed_pages(self, pool: str) -> int:
        """Pages that a node's pool must have.

        Where devices share a node's memory there is room for every expert once. There is room for the exchange of
        several generations: while experts move, those of two are there, and what a third one left may still have to be
        freed.
        """
        ranks = [rank for rank in range(len(self.seats)) if self.device_pool(rank) == pool]
        experts = self.placement.layers * self.placement.experts * self.memory.expert_pages if ranks else 0
        kv = sum(self.kv_blocks(rank) for rank in ranks) * self.memory.kv_block_pages
        return self._with_books(experts + kv + self.memory.trunk_pages + 4 * self.exchange_pages)

    def own_pool_pages(self, seat: Seat) -> int:
        """Pages of the pool of a device with a memory of its own, also of one that is not here yet."""
        return self._with_books(self.device_pages(seat))

    def _with_books(self, pages: int) -> int:
        """So many pages and those of the pool's table and ledger."""
        size, total = self.memory.page_bytes, pages
        while total - (books := table_pages(PoolGeometry("", total, size)) + self._ledger_pages(total)) < pages:
            total = pages + books
        return total

    def _ledger_pages(self, pages: int) -> int:
        return -(-pages * self.ledger_record_bytes // self.memory.page_bytes)

    def extents(self, generation: int) -> Mapping[str, tuple[ExtentRequest, ...]]:
        """What every pool must hold before this generation can run."""
        if not self.exchange_pages:
            return self._lasting
        pool = node_pool(self.seats[0].node)
        exchange = ExtentRequest(f"exchange/{generation}", "exchange", self.exchange_pages)
        return {**self._lasting, pool: (*self._lasting[pool], exchange)}

    @cached_property
    def _lasting(self) -> Mapping[str, tuple[ExtentRequest, ...]]:
        """Extents that have the same names in every generation of this layout."""
        wanted: dict[str, dict[str, ExtentRequest]] = {pool: {} for pool in self.pools}

        def want(pool: str, request: ExtentRequest) -> None:
            wanted[pool][request.key] = request

        for node in self.nodes:
            want(node_pool(node), ExtentRequest(TRUNK_KEY, "trunk", self.memory.trunk_pages))
        for rank, seat in enumerate(self.seats):
            pool = self.device_pool(rank)
            for layer, expert in self.experts_of(rank):
                want(pool, ExtentRequest(expert_key(layer, expert), "experts", self.memory.expert_pages))
            pages = self.kv_blocks(rank) * self.memory.kv_block_pages
            want(pool, ExtentRequest(kv_key(seat.device), "kv", pages))
        return MappingProxyType({pool: tuple(requests.values()) for pool, requests in wanted.items()})


def node_pool(node: str) -> str:
    """Name of a node's pool."""
    return _NODE + node


def own_pool(seat: Seat) -> str:
    """Name of the pool of a device with a memory of its own."""
    return f"device/{seat.node}/{seat.device}"


def node_of_pool(pool: str) -> str:
    """The node that a pool is on, by its name."""
    return pool.split("/")[1]


def pool_title(pool: str) -> str:
    """What people are shown of a pool's name: ``device NAME``, or ``node ID`` cut short."""
    what, *_, name = pool.split("/")
    return f"{what} {name[:8]}" if what == "node" else f"{what} {name}"


def is_node_pool(pool: str) -> bool:
    """Whether a node's workers share that pool; else it is one device's."""
    return pool.startswith(_NODE)
