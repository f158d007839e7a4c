"""One replica per device, two kinds of devices: the best layout and a proof, by dynamic programming (eq. 18).

Where no device has more than one slot, all that matters is how many devices of each kind a unit has.
"""

from __future__ import annotations

import numpy as np

from .fields import FloatArray, IntArray
from .layout import Layout
from .piece_prices import Kind, kinds_at
from .units import LayerProblem

PRECISION = 5e-5
"""Relative width at which the search for the least time stops."""
ROUNDING = 1e-12
"""Relative room added to devices, so that rounding never refutes a time that a placement reaches."""


def applies(layer: LayerProblem) -> bool:
    """Whether `best_singles` can answer: alike replicas, one slot each, at most two kinds of devices."""
    if not layer.plain or int(layer.slots_D.max()) > 1:
        return False
    there_D = layer.slots_D > 0
    table = np.stack([layer.base_D, layer.token_s_D, layer.read_UD[0]], axis=1)[there_D]
    return len(np.unique(table, axis=0)) <= 2


def best_singles(layer: LayerProblem, known_s: float, cost_s: float) -> tuple[float, Layout | None]:
    """The least time between a bound and the time of a placement, to `PRECISION`: a bound, and a layout near it.

    None if no time below ``cost_s`` was found possible.
    """
    low_s, high_s, best = known_s, cost_s, None
    while high_s - low_s > PRECISION * high_s:
        middle_s = 0.5 * (low_s + high_s)
        layout = layout_within(layer, middle_s)
        if layout is None:
            low_s = middle_s
        else:
            high_s, best = middle_s, layout
    return low_s, best


def layout_within(layer: LayerProblem, time_s: float) -> Layout | None:
    """A layout that takes at most ``time_s`` seconds, or None if there is none."""
    kinds = sorted(kinds_at(layer, layer.base_D, time_s), key=lambda kind: kind.read - kind.room)
    if not kinds:
        return None
    fast, slow = kinds[0], kinds[1] if len(kinds) > 1 else None
    chosen = _counts(layer.tokens_U, fast, slow)
    if chosen is None:
        return None
    fast_U, slow_U = chosen
    unit_R = np.concatenate((np.repeat(np.arange(layer.units), fast_U), np.repeat(np.arange(layer.units), slow_U)))
    names = np.array(slow.devices if slow is not None else (), dtype=np.int64)
    device_R = np.concatenate((np.array(fast.devices)[: fast_U.sum()], names[: slow_U.sum()]))
    room_R = np.concatenate((np.full(fast_U.sum(), _most(fast)), np.full(slow_U.sum(), _most(slow))))
    room_U = np.bincount(unit_R, weights=room_R, minlength=layer.units)
    return Layout(unit_R, device_R, layer.tokens_U[unit_R] * room_R / room_U[unit_R])


def _most(kind: Kind | None) -> float:
    """Tokens that a device's one replica can serve."""
    return 0.0 if kind is None else kind.room * (1.0 + ROUNDING) - kind.read


def _counts(tokens_U: FloatArray, fast: Kind, slow: Kind | None) -> tuple[IntArray, IntArray] | None:
    """Devices of both kinds for every unit with the fewest fast ones in all; None if there are too few.

    Eq. 18, over the number of slow devices used so far.
    """
    width = 1 + (slow.count if slow is not None else 0)
    most_fast, most_slow = _most(fast), _most(slow)
    least = np.zeros(width)
    slow_UW = np.zeros((len(tokens_U), width), dtype=np.int64)
    fast_UW = np.zeros((len(tokens_U), width), dtype=np.int64)
    for u, tokens in enumerate(tokens_U.tolist()):
        alone = max(1, int(np.ceil(tokens / most_fast)))
        then = least + alone
        fast_UW[u] = alone
        for count in range(alone - 1, -1, -1) if most_slow > 0.0 else ():
            beside = max(1, int(np.ceil((tokens - count * most_fast) / most_slow)))
            if beside >= width:
                break
            with_W = least[: width - beside] + count
            better_W = with_W < then[beside:]
            then[beside:][better_W] = with_W[better_W]
            slow_UW[u, beside:][better_W] = beside
            fast_UW[u, beside:][better_W] = count
        least = then
    at = int(least.argmin())
    if least[at] > fast.count:
        return None
    fast_U, slow_U = np.zeros((2, len(tokens_U)), dtype=np.int64)
    for u in range(len(tokens_U) - 1, -1, -1):
        fast_U[u], slow_U[u] = fast_UW[u, at], slow_UW[u, at]
        at -= int(slow_U[u])
    return fast_U, slow_U
