"""Lower bounds: no placement of a layer costs less (eq. 11 to 14 and 16 of ``planners/README.md``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .comm import home_seconds_per_token_D
from .fields import BoolArray, FloatArray, IntArray
from .problem import PlacementProblem
from .risk import risk
from .units import LayerProblem
from .value_bound import value_bound

PRECISION = 1e-7
"""Relative width at which the bisection over T stops."""
SAFE = 1.0 - 1e-12
"""Factor on needs, so that rounding never refutes a T that a placement reaches."""


@dataclass(frozen=True, eq=False)
class _Case:
    """One case of a layer, with units sorted by tokens, largest first."""

    tokens_U: FloatArray
    width_U: IntArray
    bytes_U: FloatArray
    least_replicas_U: IntArray
    base_D: FloatArray
    rate_D: FloatArray
    bandwidth_D: FloatArray
    slots_D: IntArray
    budget_D: FloatArray

    @property
    def slot_bytes(self) -> float:
        return float((self.bytes_U / self.width_U).min())


def _case(layer: LayerProblem, tokens_U: FloatArray, base_D: FloatArray) -> _Case:
    order = np.argsort(-tokens_U, kind="stable")
    least = np.maximum(layer.pinned_UD.sum(axis=1), layer.min_nodes)
    return _Case(
        tokens_U=tokens_U[order],
        width_U=layer.width_U[order],
        bytes_U=layer.bytes_U[order],
        least_replicas_U=least[order],
        base_D=base_D,
        rate_D=layer.token_s_D,
        bandwidth_D=layer.bytes_U[0] / layer.read_UD[0],
        slots_D=layer.slots_D,
        budget_D=layer.budget_D,
    )


@dataclass(frozen=True, eq=False)
class _At:
    """What devices can hold, and what units need, if the layer is to take at most T seconds."""

    slots_D: IntArray
    room_D: FloatArray
    replicas_U: IntArray
    possible: bool


def _at(case: _Case, time_s: float) -> _At:
    spare_D = np.maximum(time_s - case.base_D, 0.0)
    slot_s_D = case.slot_bytes / case.bandwidth_D
    slots_D = np.minimum(case.slots_D, np.floor(spare_D / slot_s_D * (1 + 1e-9))).astype(np.int64)
    room_D = np.where(slots_D > 0, spare_D / case.rate_D, 0.0)
    single_D = np.where(slots_D > 0, (spare_D - case.bytes_U.min() / case.bandwidth_D) / case.rate_D, 0.0)
    most_P = np.cumsum(-np.sort(-np.maximum(single_D, 0.0)))
    replicas_U = np.searchsorted(most_P, case.tokens_U * SAFE) + 1
    possible = bool(replicas_U.max() <= len(slots_D))
    return _At(slots_D, room_D, np.maximum(replicas_U, case.least_replicas_U), possible)


def _counts_fit(case: _Case, at: _At) -> bool:
    """Eq. 11 and 12: enough slots for every unit's replicas, and enough time for all bytes and tokens."""
    if not at.possible or int(at.replicas_U @ case.width_U) > int(at.slots_D.sum()):
        return False
    need_bytes = float(at.replicas_U @ case.bytes_U) * SAFE
    top_bytes = float((case.bytes_U / case.width_U).max())
    hold_D = np.minimum(np.minimum(case.budget_D, at.slots_D * top_bytes), at.room_D * case.rate_D * case.bandwidth_D)
    tokens_per_byte_D = 1.0 / (case.bandwidth_D * case.rate_D)
    cheap = np.argsort(tokens_per_byte_D, kind="stable")
    before = np.cumsum(hold_D[cheap]) - hold_D[cheap]
    taken = np.clip(need_bytes - before, 0.0, hold_D[cheap])
    if taken.sum() < need_bytes * SAFE:
        return False
    room = float(at.room_D.sum() - taken @ tokens_per_byte_D[cheap])
    return room >= float(case.tokens_U.sum()) * SAFE


def _slow_fit(case: _Case, at: _At) -> bool:
    """Eq. 14: for every number of slowest devices, can they hold what finds no slot elsewhere?"""
    slow = np.argsort(at.room_D, kind="stable")
    outside_P = np.concatenate(([0], np.cumsum(at.slots_D[slow[::-1]])))[::-1]
    inside_P = np.maximum(0, len(case.tokens_U) - outside_P // int(case.width_U.min()))
    smallest = np.concatenate(([0.0], np.cumsum(case.tokens_U[::-1])))
    byte_tokens_D = case.bytes_U.min() / (case.bandwidth_D * case.rate_D)
    cheapest_P = np.concatenate(([0.0], np.minimum.accumulate(byte_tokens_D[slow])))
    capacity_P = np.concatenate(([0.0], np.cumsum(at.room_D[slow])))
    need_P = smallest[inside_P] + inside_P * cheapest_P
    return bool((need_P * SAFE <= capacity_P).all())


def _confined(case: _Case, at: _At, prefix_K: IntArray) -> BoolArray:
    """Eq. 13 for every number in ``prefix_K`` of largest units: is there a set of devices that can hold them?

    The k largest units sit on p devices; whatever finds no slot elsewhere sits there too.
    """
    units, devices = len(case.tokens_U), len(at.slots_D)
    thin = int(case.width_U.min())
    slots_by_unit = np.cumsum(at.replicas_U * case.width_U)
    largest = np.cumsum(case.tokens_U)[prefix_K - 1]
    smallest = np.concatenate(([0.0], np.cumsum(case.tokens_U[::-1])))
    p_P = np.arange(1, devices + 1)
    outside_P = np.concatenate(([0], np.cumsum(np.sort(at.slots_D)[::-1])))[::-1][1:]
    capacity_P = np.cumsum(-np.sort(-at.room_D))
    spare = int(at.slots_D.sum()) - (slots_by_unit[-1] - slots_by_unit[prefix_K - 1])
    inside_KP = np.maximum(0, (units - prefix_K)[:, None] - outside_P // thin)
    byte_tokens = float((1.0 / (case.bandwidth_D * case.rate_D)).min()) * float(case.bytes_U.min())
    replicas_KP = np.maximum(np.cumsum(at.replicas_U)[prefix_K - 1][:, None], p_P) + inside_KP
    need_KP = largest[:, None] + smallest[inside_KP] + byte_tokens * replicas_KP
    fits: BoolArray = ((capacity_P >= need_KP * SAFE) & (p_P <= (spare // thin)[:, None])).any(axis=1)
    return fits


def _least_time(low: float, high: float, fits: Callable[[float], bool]) -> float:
    """The largest T known not to fit, or ``low``; ``fits`` must be monotone."""
    if fits(low):
        return low
    while not fits(high):
        low, high = high, 2.0 * high
    while high - low > PRECISION * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return low


def _fits(case: _Case, time_s: float) -> bool:
    at = _at(case, time_s)
    return _counts_fit(case, at) and _slow_fit(case, at)


def case_bound(layer: LayerProblem, tokens_U: FloatArray, base_D: FloatArray) -> float:
    """No placement serves ``tokens_U`` in less than this many seconds; the problem must have passed `lacks`."""
    return value_bound(layer, tokens_U, base_D, count_bound(layer, tokens_U, base_D))


def count_bound(layer: LayerProblem, tokens_U: FloatArray, base_D: FloatArray) -> float:
    """The bound of eq. 11 to 14 alone."""
    case = _case(layer, tokens_U, base_D)
    even_s = float((tokens_U.sum() + (base_D / layer.token_s_D).sum()) / (1.0 / layer.token_s_D).sum())
    start = max(float(base_D.max()), even_s, 1e-30)
    counted = _least_time(start, 2.0 * start, lambda t: _fits(case, t))
    every = np.arange(1, layer.units + 1)
    above = counted * (1.0 + 2.0 * PRECISION)
    tight = every[~_confined(case, _at(case, above), every)]
    if len(tight) == 0:
        return counted
    return _least_time(above, 1.1 * above, lambda t: bool(_confined(case, _at(case, t), tight).all()))


def replicas_needed(layer: LayerProblem, time_s: float) -> int:
    """Fewest replicas, in all, with which the layer's mean loads can take ``time_s`` seconds (eq. 11)."""
    at = _at(_case(layer, layer.tokens_U, layer.base_D), time_s * (1.0 + 10.0 * PRECISION))
    return int(at.replicas_U.sum())


def step_bound(layer: LayerProblem, tail: float, per_batch: bool) -> float:
    """Bound on the layer's step term (eq. 7, 8) over all cases."""
    each_C = np.array([case_bound(layer, t, b) for t, b in zip(layer.tokens_CU, layer.base_CD, strict=True)])
    bound = risk(layer.scenario_C, layer.case_weight_C, each_C, tail)
    if len(each_C) > 1 and not per_batch:
        bound = max(bound, case_bound(layer, layer.tokens_U, layer.base_D))
    return bound


def problem_bound(problem: PlacementProblem, layers: list[LayerProblem], step_L: FloatArray) -> float:
    """Bound on the whole objective (eq. 10): bounds on steps, and the least that communication and moves can be."""
    node_D, cluster_D = home_seconds_per_token_D(problem)
    least_s = float((node_D + cluster_D).min())
    home = layers if problem.loads.pairs_PEE is None else layers[:1]
    comm = sum(float(layer.tokens_U.sum()) for layer in home) * least_s
    moves = 0.0
    if problem.current is not None:
        moves = sum(la.moved_byte_s * float(la.bytes_U[~la.held_UD.any(axis=1)].sum()) for la in layers)
    return float(step_L.sum()) + comm + moves
