"""Splitting one batch's tokens of replicated experts over their replicas (eq. 6), fast enough for every step.

Workers call `split` on the counts measured after routing. It begins with the placement's fixed shares, takes a few
steps in whole tokens, then sends tokens along paths (`split_relief`), and returns as soon as the optimum is proved near
(`split_bound`). The best split so far is kept, so it is never worse than the fixed shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .fields import FloatArray, IntArray, fail
from .placement import Replica
from .split_bound import ClosedSets
from .split_relief import Arcs, Relief
from .split_spread import Spread


class Step(Enum):
    """What is done before paths are searched."""

    SPREAD = "one linear step for all devices at once (`split_spread`)"
    SWEEP = "even out two replicas at a time, expert by expert"


MANY = (Step.SPREAD, Step.SPREAD, Step.SWEEP, Step.SPREAD, Step.SWEEP)
FEW = (Step.SWEEP, Step.SWEEP)
FEW_PAIRS = 3
"""Pairs of replicas per device up to which the steps are `FEW`: a pass over them costs less than a linear step, and
there is little that several devices would have to do at once."""
_Two = tuple[int, int, int, float, float]
"""A unit with two replicas: position of the first, both devices, both rates."""
_More = tuple[list[int], list[int]]
"""A unit with more replicas: their positions, and devices."""


@dataclass(frozen=True, eq=False)
class SplitTable:
    """One layer's replicas and its devices' speeds, prepared once per placement.

    Parameters
    ----------
    replicas_E : sequence of sequence of Replica
        One layer of `Placement.replicas_LE`.
    token_s_D : ndarray, shape (D,)
        Seconds per token of every device, above 0 (any common unit will do).
    fixed_s_D : ndarray, shape (D,), optional
        Seconds of every device that do not depend on tokens.

    Raises
    ------
    OperatorError
        A rate that is not above 0, or a replica on a device without a rate.
    """

    replicas_E: Sequence[Sequence[Replica]]
    token_s_D: FloatArray
    fixed_s_D: FloatArray | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.token_s_D).all() and (self.token_s_D > 0).all()):
            fail("split: token_s_D", self.token_s_D, "finite seconds per token above 0")
        if int(self.device_R.max(initial=0)) >= len(self.token_s_D):
            fail("split: replicas: device", int(self.device_R.max()), f"below {len(self.token_s_D)}")
        if self.fixed_s_D is not None and self.fixed_s_D.shape != self.token_s_D.shape:
            fail("split: fixed_s_D", f"shape {self.fixed_s_D.shape}", f"shape {self.token_s_D.shape}")

    @cached_property
    def expert_R(self) -> IntArray:
        """Expert of every replica: experts ascending, replicas as in the placement."""
        return np.repeat(np.arange(len(self.replicas_E)), [len(r) for r in self.replicas_E])

    @cached_property
    def device_R(self) -> IntArray:
        return np.array([r.device for replicas in self.replicas_E for r in replicas], dtype=np.int64)

    @cached_property
    def _share_to_R(self) -> FloatArray:
        """Share of each expert's replicas up to and including this one; exactly 1 at its last."""
        to = [np.cumsum([r.share for r in replicas]) for replicas in self.replicas_E]
        return np.concatenate([np.append(c[:-1], 1.0) for c in to])

    @cached_property
    def _first_R(self) -> npt.NDArray[np.bool_]:
        """True at each expert's first replica."""
        return np.diff(self.expert_R, prepend=-1) > 0

    @cached_property
    def _rates(self) -> list[float]:
        rates: list[float] = self.token_s_D.tolist()
        return rates

    @cached_property
    def _twos_and_more(self) -> tuple[list[_Two], list[_More]]:
        """Experts with two replicas, and those with more."""
        twos: list[_Two] = []
        more: list[_More] = []
        at = 0
        for replicas in self.replicas_E:
            on = [r.device for r in replicas]
            if len(on) == 2:
                twos.append((at, on[0], on[1], self._rates[on[0]], self._rates[on[1]]))
            elif len(on) > 2:
                more.append((list(range(at, at + len(on))), on))
            at += len(on)
        return twos, more

    @cached_property
    def _spread(self) -> Spread:
        return Spread.of(self.expert_R, self.device_R, self.token_s_D)

    @cached_property
    def _steps(self) -> tuple[Step, ...]:
        pairs = len(self._spread.left_P)
        return () if pairs == 0 else FEW if pairs <= FEW_PAIRS * len(self._rates) else MANY

    @cached_property
    def _closed_sets(self) -> ClosedSets:
        weight_D = 1.0 / self.token_s_D
        fixed_D = np.zeros(len(weight_D)) if self.fixed_s_D is None else self.fixed_s_D * weight_D
        return ClosedSets(self.device_R, np.flatnonzero(self._first_R), weight_D, fixed_D)

    @cached_property
    def _arcs(self) -> Arcs:
        arcs: Arcs = [[] for _ in self._rates]
        at = 0
        for replicas in self.replicas_E:
            places = [(at + k, r.device) for k, r in enumerate(replicas)]
            for here, d in places:
                arcs[d] += [(here, there, other) for there, other in places if there != here]
            at += len(places)
        return arcs

    def by_share(self, tokens_E: IntArray) -> IntArray:
        """Whole tokens of every replica under the placement's fixed shares; they add up to ``tokens_E``."""
        upto_R = np.rint(self._share_to_R * tokens_E[self.expert_R]).astype(np.int64)
        before_R = np.where(self._first_R, 0, np.roll(upto_R, 1))
        return upto_R - before_R

    def time_D(self, tokens_R: npt.NDArray[np.generic]) -> FloatArray:
        """Seconds of every device under a split."""
        work_D = np.bincount(self.device_R, weights=tokens_R, minlength=len(self.token_s_D)) * self.token_s_D
        time: FloatArray = work_D if self.fixed_s_D is None else work_D + self.fixed_s_D
        return time


def split(table: SplitTable, tokens_E: IntArray, tolerance: float = 5e-3, rounds: int = 40) -> IntArray:
    """Tokens of every replica (order of ``table.expert_R``), whole numbers that add up to ``tokens_E``.

    Parameters
    ----------
    table : SplitTable
    tokens_E : ndarray of int, shape (E,)
        The batch's tokens per expert, none negative.
    tolerance : float
        Stop once the slowest device is proved within this part of the optimum.
    rounds : int
        Most searches for paths after the steps; each but the first follows a larger bound.
    """
    best_R = amount_R = table.by_share(tokens_E)
    time_D = table.time_D(amount_R)
    longest = float(time_D.max())
    bound = table._closed_sets.bound(tokens_E, time_D)
    for step in table._steps:
        if longest <= bound * (1.0 + tolerance):
            return best_R
        if step is Step.SPREAD:
            amount_R = table._spread.after(amount_R, tokens_E, time_D, bound)
        else:
            amount_R = _swept(table, amount_R, time_D)
        time_D = table.time_D(amount_R)
        bound = max(bound, table._closed_sets.bound(tokens_E, time_D))
        if time_D.max() < longest:
            best_R, longest = amount_R, float(time_D.max())
    if longest > bound * (1.0 + tolerance):
        amount, time = best_R.tolist(), table.time_D(best_R).tolist()
        Relief(table._arcs, amount, time, table._rates).run(bound, tolerance, rounds)
        best_R = np.array(amount, dtype=np.int64)
    return best_R


def _swept(table: SplitTable, amount_R: IntArray, time_D: FloatArray) -> IntArray:
    """One pass over the replicated experts; the slowest device does not get slower."""
    amount, time = amount_R.tolist(), time_D.tolist()
    _sweep_twos(table._twos_and_more[0], amount, time)
    _sweep_more(table._twos_and_more[1], amount, time, table._rates)
    return np.array(amount, dtype=np.int64)


def _sweep_twos(twos: list[_Two], amount: list[int], time: list[float]) -> None:
    for at, a, b, rate_a, rate_b in twos:
        ahead = time[a] - time[b]
        if ahead > 0:
            moved = int(ahead / (rate_a + rate_b))
            if moved > amount[at]:
                moved = amount[at]
        else:
            moved = -int(-ahead / (rate_a + rate_b))
            if -moved > amount[at + 1]:
                moved = -amount[at + 1]
        if moved:
            amount[at] -= moved
            amount[at + 1] += moved
            time[a] -= rate_a * moved
            time[b] += rate_b * moved


def _sweep_more(more: list[_More], amount: list[int], time: list[float], rate: list[float]) -> None:
    """From the slowest device that has tokens of the unit to its fastest."""
    for positions, devices in more:
        slow = fast = -1
        for k, d in enumerate(devices):
            if amount[positions[k]] and (slow < 0 or time[d] > time[devices[slow]]):
                slow = k
            if fast < 0 or time[d] < time[devices[fast]]:
                fast = k
        if slow < 0 or slow == fast:
            continue
        a, b = devices[slow], devices[fast]
        moved = min(int((time[a] - time[b]) / (rate[a] + rate[b])), amount[positions[slow]])
        if moved > 0:
            amount[positions[slow]] -= moved
            amount[positions[fast]] += moved
            time[a] -= rate[a] * moved
            time[b] += rate[b] * moved
