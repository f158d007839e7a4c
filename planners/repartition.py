"""Exact re-partition of a few devices: every way to deal out what they hold.

Two devices: one against many partners at once. Three: one trio at a time, up to eight of their replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .fields import BoolArray, FloatArray, IntArray
from .flow import Flow
from .units import LayerProblem

MOST_REPLICAS = 10
"""Replicas on both devices together up to which all partitions are tried."""
MOST_CELLS = 400_000
"""Partitions times partner devices that one try may look at."""

MOST_FREE = 8
"""Replicas of three devices that are dealt out afresh: 6,561 ways."""


@dataclass(frozen=True, eq=False)
class Deal:
    """Replicas that change sides between device ``a`` and its best partner ``b``."""

    a: int
    b: int
    to_b: list[int]
    to_a: list[int]


@lru_cache(maxsize=MOST_REPLICAS + 1)
def partitions(count: int) -> FloatArray:
    """All 0/1 rows of length ``count``: 1 keeps or puts a replica on device a."""
    rows: FloatArray = ((np.arange(2**count)[:, None] >> np.arange(count)) & 1).astype(np.float64)
    return rows


def best_deal(layer: LayerProblem, flow: Flow, a: int, partners_B: IntArray, relief: float) -> Deal | None:
    """The partner and partition with which the slower of both is fastest; None if it does not get below ``a``'s time.

    ``relief`` is the part of a second by which the slowest component gets faster for a second less on ``a``.
    """
    mine = flow.on[a]
    partners = [b for b in partners_B.tolist() if len(mine) + len(flow.on[b]) <= MOST_REPLICAS]
    units = {flow.unit[r] for r in mine}
    partners = [b for b in partners if units.isdisjoint(flow.unit[r] for r in flow.on[b])]
    if not partners:
        return None
    widest = max(len(flow.on[b]) for b in partners)
    rows = partitions(len(mine) + widest)
    partners = partners[: max(1, MOST_CELLS // len(rows))]
    table = _table(layer, flow, a, partners, widest)
    time_a = layer.base_D[a] + rows @ table.time_a_PB
    time_b = table.base_B + (1.0 - rows) @ table.time_b_PB
    ok = (rows @ table.width_PB <= layer.slots_D[a]) & ((1.0 - rows) @ table.width_PB <= table.slots_B)
    ok &= (rows @ table.bytes_PB <= layer.budget_D[a]) & ((1.0 - rows) @ table.bytes_PB <= table.budget_B)
    now = flow.time[a]
    worst = np.where(ok, np.maximum(now + (time_a - now) * relief, time_b), np.inf)
    row, column = divmod(int(worst.argmin()), len(partners))
    if not worst[row, column] < now * (1.0 - 1e-7):
        return None
    b = partners[column]
    theirs = flow.on[b]
    to_b = [r for k, r in enumerate(mine) if not rows[row, k]]
    to_a = [r for k, r in enumerate(theirs) if rows[row, len(mine) + k]]
    return Deal(a, b, to_b, to_a)


@dataclass(frozen=True, eq=False)
class _Table:
    """What each replica (P, padded with nothing) costs on either device, for every partner (B)."""

    time_a_PB: FloatArray
    time_b_PB: FloatArray
    width_PB: FloatArray
    bytes_PB: FloatArray
    base_B: FloatArray
    slots_B: IntArray
    budget_B: FloatArray


def _table(layer: LayerProblem, flow: Flow, a: int, partners: list[int], widest: int) -> _Table:
    mine = flow.on[a]
    replica_PB = np.full((len(mine) + widest, len(partners)), -1, dtype=np.int64)
    replica_PB[: len(mine)] = np.array(mine, dtype=np.int64)[:, None]
    for k, b in enumerate(partners):
        replica_PB[len(mine) : len(mine) + len(flow.on[b]), k] = flow.on[b]
    there: BoolArray = replica_PB >= 0
    unit_PB = np.array(flow.unit)[replica_PB]
    tokens_PB = np.array(flow.amount)[replica_PB]
    b_B = np.array(partners)
    return _Table(
        np.where(there, layer.read_UD[unit_PB, a] + layer.token_s_D[a] * tokens_PB, 0.0),
        np.where(there, layer.read_UD[unit_PB, b_B] + layer.token_s_D[b_B] * tokens_PB, 0.0),
        np.where(there, layer.width_U[unit_PB], 0).astype(np.float64),
        np.where(there, layer.bytes_U[unit_PB], 0.0),
        layer.base_D[b_B],
        layer.slots_D[b_B],
        layer.budget_D[b_B],
    )


@lru_cache(maxsize=MOST_FREE + 1)
def _trios(count: int) -> IntArray:
    """All rows of length ``count`` over 0, 1, 2: which of three devices gets each replica."""
    rows: IntArray = (np.arange(3**count)[:, None] // 3 ** np.arange(count)) % 3
    return rows


def best_trio(
    layer: LayerProblem, flow: Flow, trio: tuple[int, int, int], free: list[int], relief: float
) -> list[tuple[int, int, int]] | None:
    """Moves (replica, from, to) of the ``free`` replicas with which the slowest of three devices is fastest.

    None if that is not below the first one's time. ``relief`` as in `best_deal`; plain layers only.
    """
    rows = _trios(len(free))
    units = np.array([flow.unit[r] for r in free])
    tokens = np.array([flow.amount[r] for r in free])
    now, worst = flow.time[trio[0]], np.zeros(len(rows))
    for k, d in enumerate(trio):
        here = rows == k
        each = layer.read_UD[units, d] + layer.token_s_D[d] * tokens
        held = np.array([flow.device[r] == d for r in free])
        time = flow.time[d] - float(each[held].sum()) + here @ each
        time = now + (time - now) * relief if k == 0 else time
        room = int(layer.slots_D[d]) - (len(flow.on[d]) - int(held.sum()))
        worst = np.maximum(worst, np.where(here.sum(axis=1) <= room, time, np.inf))
    row = int(worst.argmin())
    if not worst[row] < now * (1.0 - 1e-7):
        return None
    to = [trio[k] for k in rows[row].tolist()]
    return [(r, flow.device[r], d) for r, d in zip(free, to, strict=True) if flow.device[r] != d]
