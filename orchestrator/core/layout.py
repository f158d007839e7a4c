"""What one generation consists of: devices, placement, pools and the extents every pool must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ...planners.placement import Placement
from ...workers.generation import TRUNK_KEY, ExchangeKind, expert_key, kv_key
from ...workers.pages.backend import PoolGeometry
from ...workers.pages.store import table_pages
from ...workers.pages.table import ExtentRequest
from ..sizing import MemoryPlan

MemoryMode = Literal["shared", "separate"]


@dataclass(frozen=True, slots=True)
class Seat:
    """One device of the deployment: its name and the node it belongs to."""

    device: str
    node: str


@dataclass(frozen=True, slots=True)
class Layout:
    """One complete configuration. Rank ``r`` sits at ``seats[r]`` and is device ``r`` of the placement.

    Parameters
    ----------
    memory_mode : {"shared", "separate"}
        ``shared``: the devices of a node share its memory, as CPUs do: one pool per node, in which an expert has one
        copy however many workers map it. ``separate``: every device has a pool of its own; the node's pool holds
        what its workers share (trunk, exchange).
    exchange_pages : int
        Pages of the exchange region in the first node's pool; 0 unless the exchange is ``shared``.
    reserved_experts : int
        Physical experts, summed over layers, for which every device keeps room beside its KV cache, so that experts
        can move to it later.
    """

    seats: tuple[Seat, ...]
    placement: Placement
    memory: MemoryPlan
    memory_mode: MemoryMode
    exchange: ExchangeKind
    exchange_pages: int = 0
    reserved_experts: int = 0

    @property
    def nodes(self) -> tuple[str, ...]:
        """Nodes in the order of their first seat."""
        return tuple(dict.fromkeys(seat.node for seat in self.seats))

    def device_pool(self, rank: int) -> str:
        """Pool that holds this rank's experts and KV cache."""
        seat = self.seats[rank]
        return node_pool(seat.node) if self.memory_mode == "shared" else f"device/{seat.device}"

    def pools(self) -> Mapping[str, str]:
        """Every pool and its node."""
        pools = {node_pool(node): node for node in self.nodes}
        pools.update({self.device_pool(rank): seat.node for rank, seat in enumerate(self.seats)})
        return pools

    def experts_of(self, rank: int) -> list[tuple[int, int]]:
        """(MoE layer, expert) of every physical expert on this rank, by layer and slot."""
        on = self.placement.experts_LD
        return [(layer, expert) for layer in range(len(on)) for expert in on[layer][rank]]

    def kv_blocks(self, rank: int) -> int:
        """KV blocks that this rank has beside its experts and the room kept for others."""
        return self.memory.kv_blocks(max(len(self.experts_of(rank)), self.reserved_experts))

    def pool_pages(self, pool: str) -> int:
        """Pages of a pool, its page table included.

        There is room for every expert once, and for the exchange of two generations: unused pages cost no memory, and
        while experts move, those of two generations are there.
        """
        ranks = [rank for rank in range(len(self.seats)) if self.device_pool(rank) == pool]
        experts = self.placement.layers * self.placement.experts * self.memory.expert_pages if ranks else 0
        kv = sum(self.kv_blocks(rank) for rank in ranks) * self.memory.kv_block_pages
        return with_table(experts + kv + self.memory.trunk_pages + 2 * self.exchange_pages, self.memory.page_bytes)

    def extents(self, generation: int) -> Mapping[str, tuple[ExtentRequest, ...]]:
        """What every pool must hold before this generation can run."""
        wanted: dict[str, dict[str, ExtentRequest]] = {pool: {} for pool in self.pools()}

        def want(pool: str, request: ExtentRequest) -> None:
            wanted[pool][request.key] = request

        for node in self.nodes:
            want(node_pool(node), ExtentRequest(TRUNK_KEY, "trunk", self.memory.trunk_pages))
        if self.exchange_pages:
            key = f"exchange/{generation}"
            want(node_pool(self.seats[0].node), ExtentRequest(key, "exchange", self.exchange_pages))
        for rank, seat in enumerate(self.seats):
            pool = self.device_pool(rank)
            for layer, expert in self.experts_of(rank):
                want(pool, ExtentRequest(expert_key(layer, expert), "experts", self.memory.expert_pages))
            pages = self.kv_blocks(rank) * self.memory.kv_block_pages
            want(pool, ExtentRequest(kv_key(seat.device), "kv", pages))
        return {pool: tuple(requests.values()) for pool, requests in wanted.items()}


def with_table(pages: int, page_bytes: int) -> int:
    """Pages of a pool that has room for so many beside its page table."""
    total = pages
    while total - table_pages(PoolGeometry("", total, page_bytes)) < pages:
        total += table_pages(PoolGeometry("", total, page_bytes))
    return total


def node_pool(node: str) -> str:
    """Name of a node's pool."""
    return f"node/{node}"
