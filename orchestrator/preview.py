"""What a change of layout would take, before anything is done. Pure.

Seconds are meant to be kept: rates are those of a slow disk and link, and processes start as on a busy machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from .core.layout import Layout, node_pool
from .room import held_experts

_LOAD_BYTES_S = 0.5e9  # from a peer's pages or the checkpoint
_SWITCH_S = 0.5  # agreeing on a generation and switching
_START_S = 10.0  # of worker processes that are not standing by; they start together
_NONE: Mapping[str, int] = {}
Change = Literal["stays", "joins", "leaves"]


@dataclass(frozen=True, slots=True)
class DevicePreview:
    """One device before and after. ``moved_bytes`` are experts copied into the pool it uses, 0 where they are there."""

    device: str
    node: str
    change: Change
    experts_before: int
    experts_after: int
    kv_blocks_before: int
    kv_blocks_after: int
    moved_bytes: int


@dataclass(frozen=True, slots=True)
class PoolPreview:
    """Most pages of a pool in use at any moment, and bytes of weights it takes in."""

    pool: str
    node: str
    peak_pages: int
    loaded_bytes: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What a change would take.

    Parameters
    ----------
    workers_before, workers_after : int
    generations : int
        How many generations it takes: 1, or more where memory is too tight to go at once.
    exchange : str
        Afterwards.
    seconds : float
        Expected time until the last generation serves; KV caches that are copied come behind it.
    supersedes : str
        The operation under way, which would be undone or followed; empty if there is none, or it is this one.
    """

    workers_before: int
    workers_after: int
    generations: int
    exchange: str
    seconds: float
    devices: tuple[DevicePreview, ...]
    pools: tuple[PoolPreview, ...]
    supersedes: str = ""

    @property
    def moved_bytes(self) -> int:
        return sum(pool.loaded_bytes for pool in self.pools)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "moved_bytes": self.moved_bytes}


def preview(
    current: Layout, target: Layout, route: Sequence[Layout] = (), standbys: Mapping[str, int] = _NONE
) -> Preview:
    """What going from ``current`` to ``target`` takes, by way of ``route`` (which ends with it) if there is one.

    ``standbys`` are workers that stand by and need not be started, by node.
    """
    path = [current, *(route or (target,))]
    steps = [] if target == current else list(pairwise(path))
    pools = tuple(_pool(name, node, steps) for name, node in _all_pools(path).items())
    joining = Counter(seat.node for seat in target.seats if seat.device not in current.devices)
    busiest = max((pool.loaded_bytes for pool in pools), default=0)
    started = _START_S if any(n > standbys.get(node, 0) for node, n in joining.items()) else 0.0
    return Preview(
        len(current.seats),
        len(target.seats),
        len(steps),
        target.exchange,
        len(steps) * _SWITCH_S + busiest / _LOAD_BYTES_S + started,
        tuple(_devices(current, target, steps)),
        pools,
    )


def _all_pools(path: Sequence[Layout]) -> dict[str, str]:
    return {name: node for layout in path for name, node in layout.pools.items()}


def _held(layout: Layout) -> dict[str, set[tuple[int, int]]]:
    held: dict[str, set[tuple[int, int]]] = {}
    for node in layout.nodes:
        held.update(held_experts([layout], node))
    return held


def _devices(current: Layout, target: Layout, steps: Sequence[tuple[Layout, Layout]]) -> list[DevicePreview]:
    moved = _moved_experts(steps)
    size = current.memory.expert_pages * current.memory.page_bytes
    nodes = {seat.device: seat.node for layout in (current, target) for seat in layout.seats}
    return [
        DevicePreview(
            device,
            node,
            _change(device, current, target),
            _experts(current, device),
            _experts(target, device),
            _kv_blocks(current, device),
            _kv_blocks(target, device),
            moved.get(device, 0) * size,
        )
        for device, node in nodes.items()
    ]


def _change(device: str, current: Layout, target: Layout) -> Change:
    if device not in target.devices:
        return "leaves"
    return "stays" if device in current.devices else "joins"


def _experts(layout: Layout, device: str) -> int:
    return len(layout.experts_of(layout.devices.index(device))) if device in layout.devices else 0


def _kv_blocks(layout: Layout, device: str) -> int:
    return layout.kv_blocks(layout.devices.index(device)) if device in layout.devices else 0


def _moved_experts(steps: Sequence[tuple[Layout, Layout]]) -> dict[str, int]:
    """Experts that come into a pool, counted for the first device that uses them there."""
    moved: dict[str, int] = {}
    for old, new in steps:
        there = _held(old)
        for rank, seat in enumerate(new.seats):
            pool = there.setdefault(new.device_pool(rank), set())
            coming = set(new.experts_of(rank)) - pool
            pool |= coming
            moved[seat.device] = moved.get(seat.device, 0) + len(coming)
    return moved


def _pool(name: str, node: str, steps: Sequence[tuple[Layout, Layout]]) -> PoolPreview:
    loaded = sum(_loaded_pages(name, node, *step) * step[1].memory.page_bytes for step in steps)
    return PoolPreview(name, node, max((_peak_pages(name, node, *step) for step in steps), default=0), loaded)


def _loaded_pages(pool: str, node: str, old: Layout, new: Layout) -> int:
    coming = _held(new).get(pool, set()) - _held(old).get(pool, set())
    trunk = new.memory.trunk_pages if pool == node_pool(node) and node in new.nodes and node not in old.nodes else 0
    return len(coming) * new.memory.expert_pages + trunk


def _peak_pages(pool: str, node: str, old: Layout, new: Layout) -> int:
    """Old and new experts and exchanges together, and the KV of both layouts, as far as it does not yield before.

    In memory of its own a device stays within it: its KV cache yields.
    """
    memory = new.memory
    held = _held(old).get(pool, set()) | _held(new).get(pool, set())
    stages = (old.kv_in(pool), new.kv_coming_from(old, pool), new.kv_in(pool))
    kv = max(sum(blocks.values()) for blocks in stages)
    pages = len(held) * memory.expert_pages + kv * memory.kv_block_pages
    devices = [
        layout.device_pages(seat)
        for layout in (old, new)
        for rank, seat in enumerate(layout.seats)
        if layout.device_pool(rank) == pool
    ]
    if new.memory_mode == "separate" and devices:
        return min(pages, *devices)
    return pages + memory.trunk_pages + sum(at.exchange_pages for at in (old, new) if node == at.nodes[0])
