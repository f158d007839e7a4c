"""Layers of few units: which units share which devices, by dynamic programming over sets (eq. 19).

Tokens can only even out among devices that replicas join. A component of m devices and k units needs at least
k + m - 1 replicas to be joined, and can do no better than reading those and sharing its tokens evenly. The best
division into components is a bound; where a component's tokens can be cut that way (McNaughton 1959), it is reached.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .fields import FloatArray, IntArray
from .layout import Layout, flow_of
from .units import LayerProblem

MOST_UNITS = 8
MOST_DEVICES = 16
ORDERS = 12
"""Orders of units in which a component's tokens are cut, of which the best counts."""
ROUNDS = 12
"""Divisions that are tried, each the best by what is known of its components."""
Group = tuple[int, int, int]
"""Units as bits, and devices of the first and of the second kind."""
Cell = tuple[int, int]
"""Unit and device of a replica."""


@dataclass(frozen=True, eq=False)
class Fleet:
    """Devices of one or two kinds; ``second`` may be empty."""

    first: tuple[int, ...]
    second: tuple[int, ...]


def fleet_of(layer: LayerProblem) -> Fleet | None:
    """The devices by kind, if replicas are alike, units few and kinds at most two; else None."""
    there = np.flatnonzero(layer.slots_D > 0)
    if not layer.plain or layer.units > MOST_UNITS or not 0 < len(there) <= MOST_DEVICES:
        return None
    table = np.stack([layer.base_D, layer.token_s_D, layer.read_UD[0], layer.slots_D], axis=1)[there]
    rows, kind_I = np.unique(table, axis=0, return_inverse=True)
    if len(rows) > 2:
        return None
    kinds = [tuple(there[kind_I.ravel() == j].tolist()) for j in range(2)]
    return Fleet(kinds[0], kinds[1])


def best_division(layer: LayerProblem, fleet: Fleet, known_s: float, cost_s: float) -> tuple[float, Layout | None]:
    """A bound on the layer's time, and the best layout found by dividing units and devices into components.

    ``known_s`` is a bound and ``cost_s`` the time of a placement: the answer lies between them.
    """
    least = _least_times(layer, fleet, cost_s)
    bound_s, known, choose = 0.0, dict[Group, tuple[float, list[Cell]]](), random.Random(layer.layer)
    best_s, best = np.inf, None
    for done in range(ROUNDS):
        value_s, groups = divide(least)
        if done == 0:
            bound_s = value_s
        if not np.isfinite(value_s) or value_s >= best_s * (1.0 - 1e-9):
            break
        for group in groups:
            if group not in known:
                known[group] = _cut(layer, fleet, group, choose)
                least[group] = max(float(least[group]), known[group][0])
        now_s = max(known[group][0] for group in groups)
        if now_s < best_s:
            best_s, best = now_s, _joined(layer, fleet, [(group, known[group][1]) for group in groups])
    return min(max(bound_s, known_s), cost_s), best


def _least_times(layer: LayerProblem, fleet: Fleet, cost_s: float) -> FloatArray:
    """Least time of every component, by units (as bits) and devices of both kinds; above ``cost_s`` not exact."""
    room_D = np.minimum((cost_s - layer.base_D) * (1 + 1e-9) / np.maximum(layer.read_UD[0], 1e-300), 1e6)
    held_D = np.minimum(layer.slots_D, np.maximum(room_D, 0.0).astype(np.int64))
    sets = np.arange(1 << layer.units)
    member_SU = (sets[:, None] >> np.arange(layer.units)) & 1
    tokens_S, units_S = member_SU @ layer.tokens_U, member_SU.sum(axis=1)
    shape = (len(sets), len(fleet.first) + 1, len(fleet.second) + 1)
    least = np.full(shape, np.inf)
    for a in range(shape[1]):
        for b in range(shape[2]):
            devices = np.array((*fleet.first[:a], *fleet.second[:b]), dtype=np.int64)
            if len(devices) == 0:
                continue
            rate_D, read_D = layer.token_s_D[devices], layer.read_UD[0, devices]
            fixed_D = layer.base_D[devices] + read_D
            more_K = _cheapest_reads(read_D / rate_D, held_D[devices] - 1, layer.units)
            need_S = tokens_S + float((fixed_D / rate_D).sum()) + more_K[np.maximum(units_S - 1, 0)]
            time_S = np.maximum(need_S / float((1.0 / rate_D).sum()), float(fixed_D.max()))
            least[:, a, b] = np.where(units_S > 0, time_S, np.inf)
    return least


def _cheapest_reads(read_D: FloatArray, more_D: IntArray, most: int) -> FloatArray:
    """Tokens' worth of reading 0, 1... ``most`` further replicas where it is cheapest; infinite where none fits."""
    each = np.sort(np.repeat(read_D, np.clip(more_D, 0, most)))[:most]
    total: FloatArray = np.full(most + 1, np.inf)
    total[: len(each) + 1] = np.concatenate(([0.0], np.cumsum(each)))
    return total


@lru_cache(maxsize=MOST_UNITS)
def _splits(units: int) -> list[tuple[IntArray, IntArray, IntArray, IntArray]]:
    """For sets of 1, 2... units: the sets, where their splits begin, each split's two parts."""
    levels = []
    for size in range(1, units + 1):
        sets, first, part, rest = list[int](), list[int](), list[int](), list[int]()
        for whole in range(1, 1 << units):
            if whole.bit_count() == size:
                sets.append(whole)
                first.append(len(part))
                low = whole & -whole
                others = sub = whole ^ low
                while True:
                    part.append(sub | low)
                    rest.append(others ^ sub)
                    if sub == 0:
                        break
                    sub = (sub - 1) & others
        levels.append((np.array(sets), np.array(first), np.array(part), np.array(rest)))
    return levels


def divide(least: FloatArray) -> tuple[float, list[Group]]:
    """The division into components whose slowest is fastest (eq. 19), where ``least`` are their times."""
    sets, most_a, most_b = least.shape
    best = np.full(least.shape, np.inf)
    best[0] = 0.0
    for whole, first, part, rest in _splits(sets.bit_length() - 1):
        level = np.full((len(whole), most_a, most_b), np.inf)
        for a in range(most_a):
            for b in range(most_b):
                if a + b > 0:
                    slowest = np.maximum(least[part, a, b][:, None, None], best[rest][:, : most_a - a, : most_b - b])
                    fastest = np.minimum.reduceat(slowest, first, axis=0)
                    np.minimum(level[:, a:, b:], fastest, out=level[:, a:, b:])
        best[whole] = level
    return float(best[-1, -1, -1]), _groups(least, best)


def _groups(least: FloatArray, best: FloatArray) -> list[Group]:
    """Components of the best division, found again from the table."""
    found: list[Group] = []
    whole, a_left, b_left = (n - 1 for n in least.shape)
    while whole and np.isfinite(best[whole, a_left, b_left]):
        low = whole & -whole
        others = sub = whole ^ low
        options: list[tuple[float, Group]] = []
        while True:
            then = np.maximum(
                least[sub | low, : a_left + 1, : b_left + 1],
                best[others ^ sub, : a_left + 1, : b_left + 1][::-1, ::-1],
            )
            a, b = np.unravel_index(int(then.argmin()), then.shape)
            options.append((float(then[a, b]), (sub | low, int(a), int(b))))
            if sub == 0:
                break
            sub = (sub - 1) & others
        group = min(options)[1]
        found.append(group)
        whole, a_left, b_left = whole ^ group[0], a_left - group[1], b_left - group[2]
    return found


def _cut(layer: LayerProblem, fleet: Fleet, group: Group, choose: random.Random) -> tuple[float, list[Cell]]:
    """The best cut of a component found: its time, and replicas on the first devices of each kind."""
    units = [u for u in range(layer.units) if group[0] >> u & 1]
    devices = [*fleet.first[: group[1]], *fleet.second[: group[2]]]
    target_s = float(_least_times_of(layer, units, devices))
    best: tuple[float, list[Cell]] = (np.inf, [])
    order = sorted(units, key=lambda u: -float(layer.tokens_U[u]))
    for _ in range(ORDERS if len(units) + len(devices) > 3 else 2):
        cells = _wrapped(layer, order, devices, target_s)
        if cells is not None:
            time_s = _settled(layer, cells)
            best = min(best, (time_s, cells))
            if time_s <= target_s * (1.0 + 1e-6):
                break
        choose.shuffle(order)
        choose.shuffle(devices)
    return best


def _least_times_of(layer: LayerProblem, units: list[int], devices: list[int]) -> float:
    rate_D, read_D = layer.token_s_D[devices], layer.read_UD[0, devices]
    need = float(layer.tokens_U[units].sum()) + float(((layer.base_D[devices] + read_D) / rate_D).sum())
    return (need + (len(units) - 1) * float((read_D / rate_D).min())) / float((1.0 / rate_D).sum())


def _wrapped(layer: LayerProblem, units: list[int], devices: list[int], time_s: float) -> list[Cell] | None:
    """Fill one device after another to ``time_s``, cutting the unit that exceeds it; None if slots run out."""
    cells, at = list[Cell](), 0
    room_D = (time_s - layer.base_D) / layer.token_s_D
    room, slots = float(room_D[devices[0]]), int(layer.slots_D[devices[0]])
    for u in units:
        left = float(layer.tokens_U[u])
        while True:
            d = devices[at]
            read = float(layer.read_UD[u, d] / layer.token_s_D[d])
            last = at + 1 == len(devices)
            if slots >= 1 and (room > read or last):
                cells.append((u, d))
                part = left if last else min(left, room - read)
                left, room, slots = left - part, room - read - part, slots - 1
                if left <= 1e-9 * float(layer.tokens_U[u]):
                    break
            elif last:
                return None
            if at + 1 < len(devices):
                at += 1
                room, slots = float(room_D[devices[at]]), int(layer.slots_D[devices[at]])
    return cells


def _settled(layer: LayerProblem, cells: list[Cell]) -> float:
    """Time of the slowest device once the tokens are balanced (eq. 6)."""
    layout = _layout(layer, cells)
    flow = flow_of(layer, layout.unit_R, layout.device_R, layer.tokens_U, layer.base_D)
    used = sorted({d for _, d in cells})
    flow.settle(used, 1e-9 * max(flow.time))
    return max(flow.time[d] for d in used)


def _layout(layer: LayerProblem, cells: list[Cell]) -> Layout:
    unit_R, device_R = (np.array(column, dtype=np.int64) for column in zip(*cells, strict=True))
    count_U = np.bincount(unit_R, minlength=layer.units)
    return Layout(unit_R, device_R, layer.tokens_U[unit_R] / count_U[unit_R])


def _joined(layer: LayerProblem, fleet: Fleet, parts: list[tuple[Group, list[Cell]]]) -> Layout:
    """All components side by side, each on devices of its own."""
    cells, a, b = list[Cell](), 0, 0
    for (_, more_a, more_b), own in parts:
        moved = dict(zip(fleet.first[:more_a], fleet.first[a:], strict=False))
        moved |= dict(zip(fleet.second[:more_b], fleet.second[b:], strict=False))
        cells += [(u, moved[d]) for u, d in own]
        a, b = a + more_a, b + more_b
    return _layout(layer, cells)
