"""Balancing the tokens of replicated units over their devices (eq. 6).

Minimising ``sum_d T_d^2 / (2 tau_d)`` over the shares also minimises ``max_d T_d``, lexicographically: its gradient in
the tokens of device d is T_d, so at the optimum no unit has tokens on a device slower than another of its devices.
Block coordinate descent, one unit at a time, converges to it (a smooth convex function of independent blocks), and each
block is a water-filling in closed form.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class Flow:
    """Tokens of every replica, and the time of every device; plain lists, for many small updates.

    Parameters
    ----------
    tokens : list of float
        Tokens of every unit.
    unit, device : list of int
        Unit and device of every replica.
    rate_s : list of float
        Seconds per token of every device.
    fixed_s : list of float
        Seconds of every device that do not depend on tokens.

    Shares are equal at first; set ``amount`` and `recount` to begin elsewhere.
    """

    def __init__(
        self, tokens: list[float], unit: list[int], device: list[int], rate_s: list[float], fixed_s: list[float]
    ) -> None:
        self.tokens = tokens
        self.unit = unit
        self.device = device
        self.rate_s = rate_s
        self.fixed_s = fixed_s
        self.replicas: list[list[int]] = [[] for _ in tokens]
        for r, u in enumerate(unit):
            self.replicas[u].append(r)
        self.amount = [tokens[u] / len(self.replicas[u]) for u in unit]
        self.on: list[list[int]] = [[] for _ in rate_s]
        for r, d in enumerate(device):
            self.on[d].append(r)
        self.time = [0.0] * len(rate_s)
        for d in range(len(rate_s)):
            self.recount(d)

    def recount(self, device: int) -> None:
        """Add up one device afresh."""
        amount = self.amount
        self.time[device] = self.fixed_s[device] + self.rate_s[device] * sum([amount[r] for r in self.on[device]])

    def fill(self, unit: int) -> float:
        """Split one unit's tokens optimally, all else fixed; returns the largest change of a device's time."""
        replicas = self.replicas[unit]
        if len(replicas) == 2:
            return self._fill_two(replicas[0], replicas[1], self.tokens[unit])
        time, rate, device, amount = self.time, self.rate_s, self.device, self.amount
        without = sorted([(time[device[r]] - rate[device[r]] * amount[r], r) for r in replicas])
        level, weight, held = 0.0, 0.0, self.tokens[unit]
        for i, (below, r) in enumerate(without):
            weight += 1.0 / rate[device[r]]
            held += below / rate[device[r]]
            level = held / weight
            if i + 1 == len(without) or level <= without[i + 1][0]:
                break
        change = 0.0
        for below, r in without:
            d = device[r]
            now = (level - below) / rate[d] if level > below else 0.0
            change = max(change, abs(now - amount[r]) * rate[d])
            amount[r] = now
            time[d] = below + rate[d] * now
        return change

    def _fill_two(self, a: int, b: int, total: float) -> float:
        amount, time = self.amount, self.time
        da, db = self.device[a], self.device[b]
        ra, rb = self.rate_s[da], self.rate_s[db]
        below_a, below_b = time[da] - ra * amount[a], time[db] - rb * amount[b]
        now = (below_b - below_a + rb * total) / (ra + rb)
        now = 0.0 if now < 0.0 else total if now > total else now
        change = abs(now - amount[a]) * (ra if ra > rb else rb)
        amount[a], amount[b] = now, total - now
        time[da], time[db] = below_a + ra * now, below_b + rb * (total - now)
        return change

    def settle(self, devices: Iterable[int], tolerance_s: float, most: int = 4000) -> int:
        """Balance outwards from ``devices`` until no unit changes a device by more than ``tolerance_s``.

        Returns the number of units filled, at most ``most``.
        """
        queue: deque[int] = deque()
        queued: set[int] = set()
        for d in devices:
            self._push(d, queue, queued)
        done = 0
        while queue and done < most:
            u = queue.popleft()
            queued.discard(u)
            done += 1
            if self.fill(u) > tolerance_s:
                for r in self.replicas[u]:
                    self._push(self.device[r], queue, queued, but=u)
        return done

    def _push(self, device: int, queue: deque[int], queued: set[int], but: int = -1) -> None:
        for r in self.on[device]:
            u = self.unit[r]
            if u != but and u not in queued and len(self.replicas[u]) > 1:
                queued.add(u)
                queue.append(u)

    def component(self, device: int, tolerance: float = 1e-6) -> set[int]:
        """Devices that must be relieved together with ``device``: tokens it gives away could only go there."""
        least = self.time[device] * (1.0 - tolerance)
        seen, todo = {device}, [device]
        while todo:
            carried = [self.unit[r] for r in self.on[todo.pop()] if self.amount[r] > 0.0]
            for other in (r for u in carried for r in self.replicas[u]):
                d = self.device[other]
                if d not in seen and self.time[d] >= least:
                    seen.add(d)
                    todo.append(d)
        return seen
