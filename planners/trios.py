"""Exact re-partition of three devices that hold few replicas, for many pairs of partners at once.

With two or three replicas per device, an exchange between two devices hardly ever fits both; the several hundred ways
to deal out seven replicas to three devices, times as many pairs of partners, do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .fields import FloatArray, IntArray
from .flow import Flow
from .units import LayerProblem

MOST = 9
"""Replicas of three devices that are dealt out."""


@dataclass(frozen=True, eq=False)
class Dealt:
    """Moves (replica, from, to), and the time of the slowest of the three devices after them."""

    time_s: float
    moves: list[tuple[int, int, int]]


@lru_cache(maxsize=32)
def ways(count: int, most: tuple[int, int, int]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """All ways to deal ``count`` replicas to three devices with so many slots: 0/1 rows for each of them."""
    rows: IntArray = (np.arange(3**count)[:, None] // 3 ** np.arange(count)) % 3
    fits_W = np.all([(rows == k).sum(axis=1) <= most[k] for k in range(3)], axis=0)
    first, second, third = ((rows[fits_W] == k).astype(np.float64) for k in range(3))
    return first, second, third


def best_of_trios(
    layer: LayerProblem, flow: Flow, a: int, pairs: Sequence[tuple[int, int]], relief: float
) -> Dealt | None:
    """The pair of partners and the way with which the slowest of the three is fastest; None if not below ``a``'s time.

    ``relief`` as in `repartition.best_deal`; for plain layers. Pairs that hold too many replicas, or a unit twice, are
    left out.
    """
    groups: dict[tuple[int, tuple[int, int, int]], list[tuple[int, int, int]]] = {}
    for b, c in pairs:
        held = [*flow.on[a], *flow.on[b], *flow.on[c]]
        if len(held) <= MOST and len({flow.unit[r] for r in held}) == len(held):
            slots = tuple(min(int(layer.slots_D[d]), len(held)) for d in (a, b, c))
            groups.setdefault((len(held), (slots[0], slots[1], slots[2])), []).append((a, b, c))
    found = [_best(layer, flow, trios, ways(*key), relief) for key, trios in groups.items()]
    best = min(found, key=lambda dealt: dealt.time_s, default=None)
    return None if best is None or not best.time_s < flow.time[a] * (1.0 - 1e-7) else best


def _best(
    layer: LayerProblem,
    flow: Flow,
    trios: list[tuple[int, int, int]],
    rows: tuple[FloatArray, FloatArray, FloatArray],
    relief: float,
) -> Dealt:
    """The best of trios that hold equally many replicas (P) and have the same slots."""
    replica_PT = np.array([[r for d in trio for r in flow.on[d]] for trio in trios]).T
    tokens_PT = np.array(flow.amount)[replica_PT]
    device_KT = np.array(trios).T
    now = flow.time[trios[0][0]]
    worst_WT: FloatArray | None = None
    for k in range(3):
        d_T = device_KT[k]
        time_WT = (rows[k] @ tokens_PT) * layer.token_s_D[d_T] + rows[k].sum(axis=1)[:, None] * layer.read_UD[0, d_T]
        time_WT += layer.base_D[d_T]
        if k == 0:
            time_WT = now + (time_WT - now) * relief
        worst_WT = time_WT if worst_WT is None else np.maximum(worst_WT, time_WT)
    assert worst_WT is not None
    way, trio = divmod(int(worst_WT.argmin()), len(trios))
    to_P = np.argmax([rows[k][way] for k in range(3)], axis=0)
    replicas = replica_PT[:, trio].tolist()
    moves = [(r, flow.device[r], trios[trio][k]) for r, k in zip(replicas, to_P.tolist(), strict=True)]
    return Dealt(float(worst_WT[way, trio]), [move for move in moves if move[1] != move[2]])
