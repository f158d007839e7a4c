"""A lower bound by worth: what every unit is worth at least, against what a device can hold at most (eq. 16).

Counting (``bounds.py``) takes replicas and tokens as if they could be cut to fill every device exactly. Where a device
holds two to four replicas, reading them leaves rooms that few combinations fill. A function f with
``sum f(s) <= 1`` whenever ``sum s <= 1`` (a dual feasible function, Lueker 1983) makes every replica worth f of the
room that it takes, so that no device holds more than 1; what a unit is worth under its cheapest cut is then a demand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np

from .fields import FloatArray
from .units import LayerProblem

SLOPES = (1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0, 6.0)
"""Slopes k of f that are tried."""
MOST_HELD = 4
"""Replicas per device up to which this bound can say more than counting, and their combinations are enumerated."""
PRECISION = 1e-5
SAFE = 1.0 - 1e-9


def step_function(size: FloatArray, slope: float) -> FloatArray:
    """f of eq. 16 for parts ``size`` of a device: 1/2 around one half, steeper elsewhere, and f(s) + f(1-s) = 1.

    The flat part has half-width (k - 1) / 6k, with which three parts of 1/3 are worth 1/3 each: then the function is
    superadditive, so it is dual feasible for any number of parts.
    """
    half = (slope - 1.0) / (6.0 * slope)
    away = np.abs(size - 0.5)
    worth: FloatArray = 0.5 + np.sign(size - 0.5) * np.minimum(slope * np.maximum(away - half, 0.0), 0.5)
    return worth


@dataclass(frozen=True, eq=False)
class _Worth:
    """Worth of a replica by its tokens, at a trial time: piecewise linear between ``at_K``, up to ``most`` tokens."""

    slope: float
    room: float
    read: float
    most: float
    at_K: FloatArray

    def __call__(self, tokens: FloatArray) -> FloatArray:
        return step_function((self.read + tokens) / self.room, self.slope)


@dataclass(frozen=True, slots=True)
class _Kind:
    """Devices alike: room and reading in tokens, slots, and how many there are."""

    room: float
    read: float
    slots: int
    count: int

    @property
    def held(self) -> int:
        """Most replicas that it has slots and time for."""
        return min(self.slots, int(self.room / self.read)) if self.read > 0 else self.slots


def _kinds(layer: LayerProblem, base_D: FloatArray, time_s: float) -> list[_Kind]:
    """Kinds of devices that can hold anything, the one with most room for a single replica first."""
    table = np.stack([(time_s - base_D) / layer.token_s_D, layer.read_UD[0] / layer.token_s_D, layer.slots_D], axis=1)
    rows, count = np.unique(table, axis=0, return_counts=True)
    pairs = zip(rows.tolist(), count.tolist(), strict=True)
    kinds = [_Kind(room, read, int(slots), number) for (room, read, slots), number in pairs]
    return sorted((k for k in kinds if k.held > 0), key=lambda k: k.read - k.room)


def _worth(kind: _Kind, slope: float) -> _Worth:
    half = (slope - 1.0) / (6.0 * slope)
    size_K = 0.5 + np.array([-half - 0.5 / slope, -half, half, half + 0.5 / slope])
    most = kind.room - kind.read
    at_K = np.unique(np.clip(np.concatenate((size_K * kind.room - kind.read, [0.0, most])), 0.0, most))
    return _Worth(slope, kind.room, kind.read, most, at_K)


def _capacity(kind: _Kind, worth: _Worth) -> float:
    """Most worth that a device can hold: the worth is piecewise linear, so all tokens but one's lie on its corners."""
    best = 0.0
    for others in range(kind.held):
        combos = list(combinations_with_replacement(worth.at_K.tolist(), others))
        tokens = np.array(combos, dtype=np.float64).reshape(len(combos), others)
        left = kind.room - (others + 1) * kind.read - tokens.sum(axis=1)
        total = worth(tokens).sum(axis=1) + worth(np.minimum(left, worth.most))
        best = max(best, float(total[left >= 0].max(initial=0.0)))
    return best


def _demand(tokens_U: FloatArray, worth: _Worth) -> float:
    """Least worth of all units, each under its cheapest cut into replicas."""
    top = worth.most
    whole_U = np.where(tokens_U <= top, worth(np.minimum(tokens_U, top)), np.inf)
    left_UK = tokens_U[:, None] - worth.at_K
    pair_UK = worth(worth.at_K) + worth(np.clip(left_UK, 0.0, top))
    two_U = np.where((left_UK >= 0) & (left_UK <= top), pair_UK, np.inf).min(axis=1)
    return float(np.minimum(np.minimum(whole_U, two_U), _many(tokens_U, worth)).sum())


def _many(tokens_U: FloatArray, worth: _Worth) -> FloatArray:
    """At least what three or more replicas of a unit are worth: n times the convex hull at the n-th part (Jensen)."""
    x, y = _hull(worth.at_K, worth(worth.at_K))
    least_U = np.full(len(tokens_U), np.inf)
    for n in range(3, max(3, int(np.ceil(tokens_U.max() / worth.most))) + 2):
        fits_U = tokens_U <= n * worth.most
        least_U[fits_U] = np.minimum(least_U[fits_U], n * np.interp(tokens_U[fits_U] / n, x, y))
    return least_U


def _hull(x_K: FloatArray, y_K: FloatArray) -> tuple[list[float], list[float]]:
    """Lower convex hull of points with ascending x."""
    hull: list[tuple[float, float]] = []
    for x, y in zip(x_K.tolist(), y_K.tolist(), strict=True):
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return [x for x, _ in hull], [y for _, y in hull]


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) >= (c[1] - b[1]) * (b[0] - a[0])


def _refuted(layer: LayerProblem, tokens_U: FloatArray, base_D: FloatArray, time_s: float) -> Iterator[float]:
    """Slopes for which the units' worth exceeds what the devices can hold in ``time_s`` seconds."""
    kinds = _kinds(layer, base_D, time_s)
    if not kinds or max(kind.held for kind in kinds) > MOST_HELD or kinds[0].room <= kinds[0].read:
        return
    for slope in SLOPES:
        worth = _worth(kinds[0], slope)
        demand = _demand(tokens_U, worth) * SAFE
        held = [1.0, *(_capacity(kind, worth) for kind in kinds[1:])]
        if demand > sum(kind.count * most for kind, most in zip(kinds, held, strict=True)):
            yield slope


def value_bound(layer: LayerProblem, tokens_U: FloatArray, base_D: FloatArray, known_s: float) -> float:
    """``known_s``, or a larger time that no placement of plain units beats either.

    One refuted time suffices: a placement that takes less would refute itself.
    """
    if not layer.plain:
        return known_s
    low, step = known_s, 1e-3
    while next(_refuted(layer, tokens_U, base_D, low * (1.0 + step)), None) is not None:
        low, step = low * (1.0 + step), 2.0 * step
    if low == known_s:
        return known_s
    high = low * (1.0 + step)
    while high - low > PRECISION * high:
        middle = 0.5 * (low + high)
        if next(_refuted(layer, tokens_U, base_D, middle), None) is None:
            high = middle
        else:
            low = middle
    return low
