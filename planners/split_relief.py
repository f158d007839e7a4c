"""Finishing a split: tokens go along paths of shared experts from devices above a proved bound to those below it.

Shortest augmenting paths, found by distances to the devices with room that grow as paths close (Ahuja and Orlin 1991),
one search for all. Where a slow device's tokens can only reach devices at the bound or above, that closed set's mean
level is a larger bound, which no split beats (Newton's method for parametric flows).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

Arcs = list[list[tuple[int, int, int]]]
"""By device: positions of a replica there and of another of its expert, and that one's device."""


@dataclass(slots=True)
class Relief:
    """A split under way; ``amount`` and ``time`` are changed in place, and the slowest device never gets slower.

    Parameters
    ----------
    arcs : list
        See `Arcs`.
    amount : list of int
        Tokens by position.
    time, rate : list of float
        Seconds, and seconds per token, by device.
    """

    arcs: Arcs
    amount: list[int]
    time: list[float]
    rate: list[float]
    _far: list[int] = field(init=False, default_factory=list)
    """By device: steps to the nearest one with room, or fewer; where none is left, the number of devices."""
    _count: list[int] = field(init=False, default_factory=list)
    """Devices at each distance."""
    _next: list[int] = field(init=False, default_factory=list)
    """By device: arcs tried since its distance grew."""

    def run(self, bound: float, tolerance: float, rounds: int) -> bool:
        """Whether the slowest device is proved within ``tolerance`` of the optimum.

        Parameters
        ----------
        bound : float
            Time that no split beats.
        tolerance : float
        rounds : int
            Most searches; each but the first follows a larger bound.
        """
        time = self.time
        for _ in range(rounds):
            limit = bound * (1.0 + tolerance)
            slow = sorted([d for d, t in enumerate(time) if t > limit], key=lambda d: -time[d])
            if not slow:
                return True
            self._measure(bound)
            stuck = next((d for d in slow if not self._empty(d, bound, limit)), None)
            if stuck is None:
                return True
            level = self._level(self._reached(stuck))
            if level <= bound:
                return False
            bound = level
        return False

    def _level(self, devices: Iterable[int]) -> float:
        """Time at which these devices finish together: with the tokens that they hold, one of them takes no less."""
        tokens, speed = 0.0, 0.0
        for d in devices:
            tokens += self.time[d] / self.rate[d]
            speed += 1.0 / self.rate[d]
        return tokens / speed

    def _reached(self, source: int) -> list[int]:
        """Devices that tokens of the source can get to."""
        found, seen = [source], {source}
        for x in found:
            for at, _, d in self.arcs[x]:
                if self.amount[at] and d not in seen:
                    seen.add(d)
                    found.append(d)
        return found

    def _measure(self, bound: float) -> None:
        """Distances to devices below the bound."""
        arcs, amount, devices = self.arcs, self.amount, len(self.time)
        far, count = [devices] * devices, [0] * (devices + 1)
        found = [d for d, t in enumerate(self.time) if t < bound]
        for d in found:
            far[d] = 0
        steps, left = 0, devices
        while found:
            count[steps] = len(found)
            left -= len(found)
            steps += 1
            todo, found = found if left else [], []
            for d in todo:
                for _, to, x in arcs[d]:
                    if far[x] == devices and amount[to]:
                        far[x] = steps
                        found.append(x)
        count[devices] = left
        self._far, self._count, self._next = far, count, [0] * devices

    def _empty(self, source: int, bound: float, limit: float) -> bool:
        """Send tokens of the source away until it is within the limit; False where no path is left."""
        arcs, amount, far, tried, time = self.arcs, self.amount, self._far, self._next, self.time
        path: list[tuple[int, tuple[int, int, int]]] = []
        x = source
        while time[source] > limit:
            if far[x]:
                here, k, nearer = arcs[x], tried[x], far[x] - 1
                while k < len(here) and (far[here[k][2]] != nearer or not amount[here[k][0]]):
                    k += 1
                tried[x] = k
                if k < len(here):
                    path.append((x, here[k]))
                    x = here[k][2]
                    continue
            elif self._push(source, x, path, bound, limit):
                kept = next((k for k, (_, arc) in enumerate(path) if not amount[arc[0]]), None)
                if kept is not None:
                    x = path[kept][0]
                    del path[kept:]
                continue
            if not self._grow(x) or far[source] >= len(far):
                return False
            if path:
                x = path.pop()[0]
        return True

    def _grow(self, x: int) -> bool:
        """Raise the distance of a device that no arc leads on from; False where none is left at the old one.

        Distances fall by one along a path at most, so past such a gap nothing further away finds room.
        """
        far, amount = self._far, self.amount
        nearest = len(far) - 1
        for at, _, d in self.arcs[x]:
            if far[d] < nearest and amount[at]:
                nearest = far[d]
        self._count[far[x]] -= 1
        gap = not self._count[far[x]]
        far[x] = nearest + 1
        self._count[nearest + 1] += 1
        self._next[x] = 0
        return not gap

    def _push(
        self, source: int, end: int, path: list[tuple[int, tuple[int, int, int]]], bound: float, limit: float
    ) -> int:
        """Send tokens to ``end``, until it is full, its source at the bound or a replica empty; returns how many."""
        amount, time, rate = self.amount, self.time, self.rate
        moved = min(int((time[source] - bound) / rate[source]) + 1, int((limit - time[end]) / rate[end]))
        if moved <= 0:
            return 0
        for _, (at, _, _) in path:
            if amount[at] < moved:
                moved = amount[at]
        for _, (at, to, _) in path:
            amount[at] -= moved
            amount[to] += moved
        time[source] -= rate[source] * moved
        time[end] += rate[end] * moved
        return moved
