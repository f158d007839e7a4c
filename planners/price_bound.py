"""A lower bound by prices of pieces: what all units are worth at least, against what devices can hold (eq. 17).

Counting (``bounds.py``) takes replicas and tokens as if they could be cut to fill every device exactly. Where a device
holds a few replicas, reading them leaves rooms that few combinations fill, and pieces that suit one kind of device
waste another. Any prices of pieces refute a time within which the devices cannot hold enough of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .fields import FloatArray, IntArray
from .piece_prices import LATTICE, Prices, kinds_at
from .price_program import Priced, Trial, best_prices
from .units import LayerProblem

FIRST_CORNERS = 80
CORNERS = 20
"""Corners beside `Trial.marks` for a first layer, and for later ones beside those at which the first's prices bend."""
MOST_KINDS = 6
"""Kinds of devices up to which the bound is sought."""
ABOVE, ROOMY = 4e-3, 0.985
"""Where devices are to hold more than they can, as at the bound, layouts come out bad: a time that much above it is
tried, unless one was whose ratio is between this and 1."""
ELASTICITY = 1.2
"""Relative fall of the ratio for a relative growth of the time, as a first guess."""
FIRST_PART = 0.98
"""Part of a placement's time at which the search begins in a first layer."""
ROUGH = 2e-3
"""Distance to the best ratio at the first time, which only says where to look next."""
SAFE = 1.0 - 1e-9
"""Factor on ratios, so that rounding never refutes a time that a placement reaches."""


def trial_at(layer: LayerProblem, tokens_U: FloatArray, base_D: FloatArray, time_s: float) -> Trial | None:
    """The time in question; None where devices are of too many kinds, or none holds anything."""
    kinds = kinds_at(layer, base_D, time_s)
    if not 0 < len(kinds) <= MOST_KINDS:
        return None
    step = max(kind.room - kind.read for kind in kinds) / LATTICE
    return Trial(kinds, step, tokens_U / step)


@dataclass(frozen=True, slots=True)
class Care:
    """How closely the bound is approached after the first time tried.

    Parameters
    ----------
    programs : int
        Times at which prices are sought, each nearer to the largest that they refute.
    near : float
        Relative distance between times within which prices are as good for both.
    aim : float
        Times are sought whose ratio is that much above 1: at 1 and below nothing is refuted.
    fine : float
        Distance to the best ratio.
    corners : int
        As `CORNERS`.
    """

    programs: int
    near: float
    aim: float
    fine: float
    corners: int


ALIKE = Care(programs=3, near=4e-4, aim=1e-4, fine=1e-4, corners=60)
MIXED = Care(programs=4, near=1.5e-3, aim=5e-4, fine=4e-4, corners=CORNERS)
"""For one kind of devices and for several, whose programs are several times larger."""


class Pricing:
    """Seeks the bound of one layer after another; what it learns on one speeds up the next."""

    def __init__(self) -> None:
        self._known: tuple[Trial, Prices] | None = None
        self._bends: tuple[Trial, IntArray] | None = None
        self._lift = 1.0

    def bound(self, layer: LayerProblem, known_s: float, cost_s: float) -> tuple[float, list[Priced]]:
        """``known_s``, or a larger time in which no placement serves the layer's mean loads.

        Also what was found at times a little above the bound: `recipe` makes layouts of it.

        Parameters
        ----------
        layer : LayerProblem
            A plain one.
        known_s, cost_s : float
            A bound, and the time of a placement: the answer lies between them.
        """
        low_s = known_s
        time_s = known_s * self._lift if self._known is not None else FIRST_PART * cost_s
        slope, before = -ELASTICITY, (0.0, 0.0)
        found: list[Priced] = []
        care = ALIKE if len(kinds_at(layer, layer.base_D, known_s)) == 1 else MIXED
        for _ in range(care.programs):
            time_s = min(max(time_s, known_s), cost_s)
            trial = trial_at(layer, layer.tokens_U, layer.base_D, time_s)
            if trial is None:
                break
            corners, tolerance = (care.corners, care.fine) if found else (CORNERS, ROUGH)
            priced = best_prices(trial, self._first(trial, corners), tolerance)
            found.append(priced)
            ratio = priced.ratio if found[1:] else priced.estimate
            self._learn(priced)
            low_s = max(low_s, self._refuted(layer, time_s, priced.ratio, low_s))
            if 0.0 <= priced.ratio - 1.0 < care.near or (ratio < 1.0 and time_s <= known_s):
                break
            if before[0] > 0.0 and time_s != before[0]:
                slope = min(-0.5, max(-5.0, (ratio - before[1]) / (time_s / before[0] - 1.0)))
            before = time_s, ratio
            time_s *= 1.0 + (1.0 + care.aim - ratio) / slope
        self._lift = low_s / known_s
        if found and not any(ROOMY <= priced.ratio < 1.0 for priced in found):
            trial = trial_at(layer, layer.tokens_U, layer.base_D, low_s * (1.0 + ABOVE))
            if trial is not None:
                found.append(best_prices(trial, self._first(trial, CORNERS), ROUGH))
        return min(low_s, cost_s), [priced for priced in found if ROOMY <= priced.ratio < 1.0] or found[-1:]

    def _first(self, trial: Trial, corners: int) -> Prices:
        """Corners, and prices to begin with: those of the layer before, or in proportion to tokens and reading."""
        if self._bends is None or len(self._bends[0].marks) != len(trial.marks) or self._known is None:
            even = np.linspace(0, LATTICE, FIRST_CORNERS + 1).astype(np.int64)
            at_K = np.unique(np.concatenate((even, trial.marks)))
            read = min(kind.read for kind in trial.kinds)
            return Prices(at_K, at_K.astype(np.float64) * trial.step + read)
        even = np.linspace(0, LATTICE, corners + 1).astype(np.int64)
        bends = np.rint(np.interp(self._bends[1], self._bends[0].marks, trial.marks)).astype(np.int64)
        return carried(*self._known, trial, np.unique(np.concatenate((even, trial.marks, bends))))

    def _learn(self, priced: Priced) -> None:
        trial, prices = priced.trial, priced.prices
        if self._bends is None or len(self._bends[0].marks) != len(trial.marks):
            slope = np.diff(prices.price_K) / np.diff(prices.at_K)
            self._bends = trial, prices.at_K[1:-1][np.abs(np.diff(slope)) > 1e-7]
        self._known = trial, prices

    def _refuted(self, layer: LayerProblem, time_s: float, ratio: float, least_s: float) -> float:
        """The largest time found that the last prices refute, by secants; ``least_s`` if none."""
        assert self._known is not None
        trial, prices = self._known
        found_s = time_s if ratio * SAFE > 1.0 else least_s
        slope = -ELASTICITY
        for _ in range(2):
            then_s = time_s * (1.0 + (1.0 + 1e-5 - ratio) / slope)
            if then_s <= least_s or abs(then_s / time_s - 1.0) < 1e-5:
                break
            then = trial_at(layer, layer.tokens_U, layer.base_D, then_s)
            if then is None:
                break
            at = then.ratio(carried(trial, prices, then, prices_at(trial, prices, then)))
            if at * SAFE > 1.0:
                found_s = max(found_s, then_s)
            if at != ratio:
                slope = min(-0.5, max(-5.0, (at - ratio) / (then_s / time_s - 1.0)))
            time_s, ratio = then_s, at
        return found_s


def prices_at(trial: Trial, prices: Prices, then: Trial) -> IntArray:
    """The corners of prices for another trial: marks stay marks."""
    if len(trial.marks) != len(then.marks):
        return prices.at_K
    moved = np.rint(np.interp(prices.at_K, trial.marks, then.marks)).astype(np.int64)
    return np.unique(np.concatenate((moved, then.marks)))


def carried(trial: Trial, prices: Prices, then: Trial, at_K: IntArray) -> Prices:
    """Prices found for one trial, on the corners ``at_K`` of another: what filled a device is worth what it was."""
    before = np.interp(at_K, then.marks, trial.marks) if len(trial.marks) == len(then.marks) else at_K
    return Prices(at_K, np.interp(before, prices.at_K, prices.price_K))
