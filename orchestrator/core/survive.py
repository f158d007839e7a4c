"""What is left of a layout when nodes are gone. Pure, and quick: the planners improve on it later."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ...planners.placement import Placement, Replica
from .layout import Layout, Seat


def survive(layout: Layout, nodes: Collection[str]) -> Layout | None:
    """The layout without the devices of other nodes; None if it cannot go on without them.

    Replicas that are left share the tokens evenly; an expert that is lost goes to the device with the fewest physical
    experts of its layer for its memory. The same layout comes back if nothing is lost.
    """
    seats = tuple(seat for seat in layout.seats if seat.node in nodes)
    if seats == layout.seats:
        return layout
    if not seats:
        return None
    kept = [rank for rank, seat in enumerate(layout.seats) if seat.node in nodes]
    placement = _without(layout.placement, kept, seats)
    alone = len(seats) == 1
    left = replace(
        layout,
        seats=seats,
        placement=placement,
        reserved_experts=tuple(layout.reserved_experts[rank] for rank in kept) if layout.reserved_experts else (),
        exchange="solo" if alone else layout.exchange,
        exchange_pages=0 if alone else layout.exchange_pages,
    )
    return left if all(left.kv_blocks(rank) > 0 for rank in range(len(seats))) else None


def _without(placement: Placement, kept: list[int], seats: tuple[Seat, ...]) -> Placement:
    new_rank = {old: new for new, old in enumerate(kept)}
    total = [0] * len(kept)
    layers = []
    for replicas_E in placement.replicas_LE:
        slots = [0] * len(kept)
        found: list[list[int]] = []
        for replicas in replicas_E:
            found.append([new_rank[r.device] for r in replicas if r.device in new_rank])
            for device in found[-1]:
                slots[device] += 1
        for devices in found:
            if not devices:
                device = min(range(len(kept)), key=lambda d: (slots[d] / seats[d].kind.memory_part, total[d], d))
                devices.append(device)
                slots[device] += 1
                total[device] += 1
        layers.append(_numbered(found, len(kept)))
    return Placement(tuple(seat.device for seat in seats), tuple(layers))


def _numbered(devices_E: list[list[int]], devices: int) -> tuple[tuple[Replica, ...], ...]:
    """Replicas with dense slots on every device, in the order of the experts."""
    slots = [0] * devices
    layer = []
    for found in devices_E:
        replicas = []
        for device in found:
            replicas.append(Replica(device, slots[device], 1 / len(found)))
            slots[device] += 1
        layer.append(tuple(replicas))
    return tuple(layer)
