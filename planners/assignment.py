"""The best one-to-one assignment, and the relabelling of placements that rests on it."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from .cluster import Cluster
from .fields import FloatArray
from .placement import Placement, Replica


def best_assignment(gain_NM: FloatArray) -> list[int]:
    """Column of every row such that the sum of gains is greatest; rows <= columns.

    Shortest augmenting paths with potentials (Kuhn 1955; Jonker and Volgenant 1987), O(N^2 M).
    """
    rows, columns = gain_NM.shape
    cost = np.zeros((rows + 1, columns + 1))
    cost[1:, 1:] = -np.asarray(gain_NM, dtype=np.float64)
    u, v = np.zeros(rows + 1), np.zeros(columns + 1)
    row_of = np.zeros(columns + 1, dtype=np.int64)
    for row in range(1, rows + 1):
        _augment(cost, u, v, row_of, row)
    answer = [0] * rows
    for column in range(1, columns + 1):
        if row_of[column]:
            answer[int(row_of[column]) - 1] = column - 1
    return answer


def _augment(cost: FloatArray, u: FloatArray, v: FloatArray, row_of: np.ndarray, row: int) -> None:
    """Match ``row`` along a shortest path; column 0 stands for the start."""
    row_of[0] = row
    least = np.full(len(v), np.inf)
    before = np.zeros(len(v), dtype=np.int64)
    used = np.zeros(len(v), dtype=np.bool_)
    column = 0
    while True:
        used[column] = True
        reduced = cost[row_of[column]] - u[row_of[column]] - v
        better = ~used & (reduced < least)
        better[0] = False
        least[better], before[better] = reduced[better], column
        open_least = np.where(used, np.inf, least)
        open_least[0] = np.inf
        following = int(np.argmin(open_least))
        step = open_least[following]
        u[row_of[used]] += step
        v[used] -= step
        least[~used] -= step
        column = following
        if row_of[column] == 0:
            break
    while column:
        row_of[column] = row_of[before[column]]
        column = int(before[column])


def match_placement(old: Placement, new: Placement, cluster: Cluster, across_nodes: bool = False) -> Placement:
    """``new`` with the parts of alike devices exchanged, layer by layer, so that most replicas stay where they are.

    Devices are alike when their kind, memory and rates are the same and they sit on one node; with ``across_nodes``,
    the node does not matter. The load of every device kind is unchanged; pins on single devices are not looked at.
    """
    old_at = {name: i for i, name in enumerate(old.devices)}
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, name in enumerate(new.devices):
        device = cluster.devices[cluster.index[name]]
        alike = (device.kind, device.memory_bytes, device.flops, device.bandwidth_bytes_s)
        groups[(*alike, None if across_nodes else device.node)].append(i)
    layers = []
    for layer in range(new.layers):
        place = list(range(len(new.devices)))
        held = [set(old.experts_LD[layer][old_at[n]]) if n in old_at else set() for n in new.devices]
        parts = [set(experts) for experts in new.experts_LD[layer]]
        for group in groups.values():
            gain = np.array([[len(parts[a] & held[b]) for b in group] for a in group], dtype=np.float64)
            for a, b in zip(group, best_assignment(gain), strict=True):
                place[a] = group[b]
        layers.append(
            tuple(
                tuple(Replica(place[r.device], r.slot, r.share) for r in replicas)
                for replicas in new.replicas_LE[layer]
            )
        )
    return match_slots(old, Placement(new.devices, tuple(layers)))


def match_slots(old: Placement, new: Placement) -> Placement:
    """``new`` with slots renumbered so that replicas that stay keep their slot where numbers stay dense."""
    old_at = {name: i for i, name in enumerate(old.devices)}
    layers = []
    for layer in range(new.layers):
        slot_of: dict[tuple[int, int], int] = {}
        for d, name in enumerate(new.devices):
            experts = new.experts_LD[layer][d]
            before = old.experts_LD[layer][old_at[name]] if name in old_at else ()
            slots = _keep_slots(experts, before)
            slot_of.update({(e, d): slot for e, slot in slots.items()})
        layers.append(
            tuple(
                tuple(Replica(r.device, slot_of[e, r.device], r.share) for r in replicas)
                for e, replicas in enumerate(new.replicas_LE[layer])
            )
        )
    return Placement(new.devices, tuple(layers))


def _keep_slots(experts: tuple[int, ...], before: tuple[int, ...]) -> dict[int, int]:
    count = len(experts)
    slots = {e: s for s, e in enumerate(before[:count]) if e in experts}
    free = iter(sorted(set(range(count)) - set(slots.values())))
    for e in experts:
        if e not in slots:
            slots[e] = next(free)
    return slots
