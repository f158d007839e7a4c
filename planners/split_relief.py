"""Finishing a split: tokens go along paths of shared experts from the slowest devices to those below a proved bound.

The bound begins as the mean level. Where the slow devices' tokens can only reach devices at the bound or above, that
closed set's mean level is a larger bound, which no split beats (Newton's method for parametric flows).
"""

from __future__ import annotations

from dataclasses import dataclass

Outlets = list[list[tuple[int, list[tuple[int, int]]]]]
"""By device: position of each replica of a shared expert there, and its other replicas with their devices."""
_Paths = dict[int, tuple[int, int, int] | None]
"""By device reached: the device before, and the positions that tokens leave and enter; None at a source."""

TOGETHER = 0.25
"""Devices within this part of the excess of the slowest one are relieved with it."""


@dataclass(slots=True)
class Relief:
    """A split under way; ``amount`` and ``time`` are changed in place.

    Parameters
    ----------
    outlets : list
        See `Outlets`.
    amount : list of int
        Tokens by position.
    time, rate : list of float
        Seconds, and seconds per token, by device.
    """

    outlets: Outlets
    amount: list[int]
    time: list[float]
    rate: list[float]

    def run(self, tolerance: float, rounds: int) -> bool:
        """Whether the slowest device is proved within ``tolerance`` of the optimum; stops after ``rounds`` searches."""
        bound = self._level(range(len(self.time)))
        for _ in range(rounds):
            top, limit = max(self.time), bound * (1.0 + tolerance)
            if top <= limit:
                return True
            least = max(limit, top - (top - bound) * TOGETHER)
            paths, ends = self._search([d for d, t in enumerate(self.time) if t >= least], bound)
            if not ends:
                level = self._level(paths)
                if level <= bound:
                    return False
                bound = level
            elif not sum([self._push(paths, end, bound, limit) for end in ends]):
                return False
        return False

    def _level(self, devices: range | _Paths) -> float:
        """Time at which these devices finish together: with the tokens that they hold, one of them takes no less."""
        time, rate = self.time, self.rate
        return sum([time[d] / rate[d] for d in devices]) / sum([1.0 / rate[d] for d in devices])

    def _search(self, sources: list[int], bound: float) -> tuple[_Paths, list[int]]:
        """Breadth first along replicas that have tokens, up to the first devices below the bound."""
        amount, time, outlets = self.amount, self.time, self.outlets
        paths: _Paths = dict.fromkeys(sources)
        ends: list[int] = []
        todo = sources
        while todo and not ends:
            found: list[int] = []
            for x in todo:
                for at, others in outlets[x]:
                    if amount[at]:
                        for to, d in others:
                            if d not in paths:
                                paths[d] = x, at, to
                                found.append(d)
                                if time[d] < bound:
                                    ends.append(d)
            todo = found
        return paths, ends

    def _push(self, paths: _Paths, end: int, bound: float, limit: float) -> int:
        """Send tokens to ``end``, until it is full, its source at the bound or a replica empty; returns how many."""
        amount, time, rate = self.amount, self.time, self.rate
        steps, source = [], end
        while (step := paths[source]) is not None:
            steps.append(step)
            source = step[0]
        if time[source] <= limit:
            return 0
        moved = min(int((time[source] - bound) / rate[source]) + 1, int((limit - time[end]) / rate[end]))
        moved = min(moved, *[amount[at] for _, at, _ in steps])
        if moved <= 0:
            return 0
        for _, at, to in steps:
            amount[at] -= moved
            amount[to] += moved
        time[source] -= rate[source] * moved
        time[end] += rate[end] * moved
        return moved
