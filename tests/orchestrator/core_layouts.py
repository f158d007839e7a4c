"""Small layouts to go between: random placements on a few devices of one or two nodes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from concertina.orchestrator.core.layout import Layout, MemoryMode, Seat
from concertina.orchestrator.sizing import MemoryPlan
from concertina.planners.placement import Placement, Replica, balanced_placement

LAYERS, EXPERTS = 2, 3
_PAGES = {"separate": {1: 20, 2: 20, 3: 20, 4: 20}, "shared": {1: 32, 2: 24, 3: 20, 4: 18}}


def make_layout(
    seats: Sequence[tuple[str, str]],
    exchange: str = "shared",
    memory_mode: MemoryMode = "shared",
    placement: Placement | None = None,
) -> Layout:
    """Devices and nodes as given; balanced unless a placement is."""
    placed = tuple(Seat(*seat) for seat in seats)
    pages = _PAGES[memory_mode].get(len(seats), 18 if memory_mode == "shared" else 20)
    memory = MemoryPlan(page_bytes=65536, expert_pages=2, kv_block_pages=2, trunk_pages=3, device_pages=pages)
    return Layout(
        placed,
        placement or balanced_placement([seat.device for seat in placed], LAYERS, EXPERTS),
        memory,
        memory_mode,
        exchange,  # type: ignore[arg-type]
        exchange_pages=1 if exchange == "shared" else 0,
        ledger_record_bytes=64,
    )


@cache
def family(memory_mode: MemoryMode, nodes: int) -> tuple[Layout, ...]:
    """Layouts of one to four devices that a deployment may go between; devices keep their node, the first is on a.

    Two of them may have no device in common.
    """
    order = random.Random(f"{memory_mode} {nodes}")
    layouts = [_random_layout(order, devices, nodes, memory_mode) for devices in (1, 2, 3, 4) for _ in range(5)]
    return node_pages(layouts)


def node_pages(layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    """The same layouts on nodes whose pools have room for any of them, and for KV of two devices that have left."""
    pools = {pool for layout in layouts for pool in layout.pools if pool.startswith("node/")}
    most = max(layout.pool_pages(pool) for layout in layouts for pool in pools)
    more = 2 * max(layout.memory.device_pages for layout in layouts)
    return tuple(replace(layout, started=tuple((node, most + more) for node in "ab")) for layout in layouts)


def _random_layout(order: random.Random, devices: int, nodes: int, memory_mode: MemoryMode) -> Layout:
    first = order.choice((0, 0, 2))
    numbers = [first, *sorted(order.sample(sorted(set(range(5)) - {first}), devices - 1))]
    seats = [(f"cpu-{i}", "ab"[i % nodes]) for i in numbers]
    across = len({node for _, node in seats}) > 1
    exchange = "solo" if devices == 1 else "gloo" if across else "shared"
    placement = random_placement(order, [device for device, _ in seats])
    return make_layout(seats, exchange, memory_mode, placement)


def random_placement(order: random.Random, devices: Sequence[str]) -> Placement:
    """One or two replicas of every expert, anywhere."""
    layers = []
    for _ in range(LAYERS):
        slots = [0] * len(devices)
        layer = []
        for _ in range(EXPERTS):
            on = order.sample(range(len(devices)), order.randint(1, min(2, len(devices))))
            layer.append(tuple(Replica(device, slots[device], 1 / len(on)) for device in on))
            for device in on:
                slots[device] += 1
        layers.append(tuple(layer))
    return Placement(tuple(devices), tuple(layers))
