"""Tokens of one layer's experts over their replicas, kept within every device's capacity by augmenting paths.

Given replicas, whether every device can stay below a step time T is a flow problem: expert e supplies its tokens,
each replica is an edge, and device d takes ``(T - read_d) / seconds_per_token_d`` tokens (eq. 4 of
``planners/README.md`` solved for the tokens). `relieve` finds the largest flow; what is left over is the *excess*,
and the devices it can still reach are the tight side of the minimum cut: only a replica that leads out of it helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_RELATIVE_EPS = 1e-9


@dataclass(slots=True)
class Routing:
    """Mutable search state of one layer; `copy` is cheap (dictionaries are replaced, never changed in place).

    Parameters
    ----------
    tokens_E : list of float
        Tokens per expert.
    read_ED : sequence of sequences of float
        Tokens that reading expert e's weights on device d costs in time.
    flow_E : list of dict
        ``flow_E[e][d]``: tokens of expert e served on device d; its keys are e's replicas.
    load_D, capacity_D : list of float
        Tokens served, and the most that may be, per device; a capacity already excludes the replicas' reads.
    held_D : list of frozenset
        Experts with a replica on each device.
    eps : float
        Tokens below which a difference is rounding.
    """

    tokens_E: list[float]
    read_ED: Sequence[Sequence[float]]
    flow_E: list[dict[int, float]]
    load_D: list[float]
    capacity_D: list[float]
    held_D: list[frozenset[int]]
    eps: float

    @classmethod
    def empty(
        cls, tokens_E: Sequence[float], read_ED: Sequence[Sequence[float]], capacity_D: Sequence[float]
    ) -> Routing:
        """No replica anywhere."""
        devices = len(capacity_D)
        eps = _RELATIVE_EPS * max(sum(tokens_E), 1e-300)
        flow_E: list[dict[int, float]] = [{} for _ in tokens_E]
        held: list[frozenset[int]] = [frozenset()] * devices
        return cls(list(tokens_E), read_ED, flow_E, [0.0] * devices, list(capacity_D), held, eps)

    def copy(self) -> Routing:
        return Routing(
            self.tokens_E,
            self.read_ED,
            list(self.flow_E),
            list(self.load_D),
            list(self.capacity_D),
            list(self.held_D),
            self.eps,
        )

    def add(self, expert: int, device: int) -> None:
        """A new replica; it takes all tokens if it is the only one, else none yet."""
        flow = dict(self.flow_E[expert])
        flow[device] = 0.0 if flow else self.tokens_E[expert]
        self.load_D[device] += flow[device]
        self.flow_E[expert] = flow
        self.capacity_D[device] -= self.read_ED[expert][device]
        self.held_D[device] |= {expert}

    def remove(self, expert: int, device: int) -> None:
        """Drop a replica; its tokens go to the expert's other replicas by their slack."""
        flow = dict(self.flow_E[expert])
        tokens = flow.pop(device)
        self.load_D[device] -= tokens
        self.capacity_D[device] += self.read_ED[expert][device]
        self.held_D[device] -= {expert}
        if flow:
            to = max(flow, key=lambda d: (self.slack(d), -d))
            flow[to] += tokens
            self.load_D[to] += tokens
        self.flow_E[expert] = flow

    def set_shares(self, expert: int, share: dict[int, float]) -> None:
        """Serve the expert's tokens in proportion to ``share`` (keys are its replicas)."""
        total = sum(share.values())
        flow = {}
        for d, before in self.flow_E[expert].items():
            part = share[d] / total if total > 0 else 1.0 / len(share)
            flow[d] = self.tokens_E[expert] * part
            self.load_D[d] += flow[d] - before
        self.flow_E[expert] = flow

    def slack(self, device: int) -> float:
        return self.capacity_D[device] - self.load_D[device]

    def excess(self) -> float:
        """Tokens above capacity, over all devices."""
        return sum(max(0.0, load - cap) for load, cap in zip(self.load_D, self.capacity_D, strict=True))

    def relieve(self) -> tuple[float, set[int]]:
        """Push tokens from devices above capacity to devices with slack, as far as replicas allow.

        Returns
        -------
        excess : float
            Tokens that no device can take; 0.0 within rounding when all fit.
        tight : set of int
            Devices the excess can reach: all are full. Empty when nothing is left.
        """
        while True:
            roots = [d for d in range(len(self.load_D)) if self.slack(d) < -self.eps]
            if not roots:
                return 0.0, set()
            parent, end = self._search(roots)
            if end is None:
                return self.excess(), set(parent)
            self._push(parent, end)

    def relays(self) -> dict[int, float]:
        """Devices that have slack or can pass tokens on to one that has, and the most they might take in."""
        room = {d: self.slack(d) for d in range(len(self.load_D)) if self.slack(d) > self.eps}
        total, queue = sum(room.values()), sorted(room)
        while queue:
            v = queue.pop()
            for expert in self.held_D[v]:
                flow = self.flow_E[expert]
                for u, tokens in flow.items() if len(flow) > 1 else ():
                    if u not in room and tokens > self.eps:
                        room[u] = total
                        queue.append(u)
        return room

    def _search(self, roots: list[int]) -> tuple[dict[int, tuple[int, int]], int | None]:
        """Breadth first over devices; ``parent[device] = (from device, expert moved)``."""
        parent: dict[int, tuple[int, int]] = dict.fromkeys(roots, (-1, -1))
        queue = roots
        eps, flow_E = self.eps, self.flow_E
        while queue:
            found: list[int] = []
            for u in queue:
                for expert in self.held_D[u]:
                    flow = flow_E[expert]
                    if len(flow) > 1 and flow[u] > eps:
                        for v in flow:
                            if v not in parent:
                                parent[v] = (u, expert)
                                found.append(v)
            if found:
                best = max(found, key=lambda d: (self.slack(d), -d))
                if self.slack(best) > eps:
                    return parent, best
            queue = found
        return parent, None

    def _push(self, parent: dict[int, tuple[int, int]], end: int) -> None:
        path = []
        device = end
        while parent[device][0] >= 0:
            before, expert = parent[device]
            path.append((before, device, expert))
            device = before
        amount = min(self.slack(end), -self.slack(device), *(self.flow_E[e][u] for u, _, e in path))
        for u, v, expert in path:
            flow = dict(self.flow_E[expert])
            flow[u] -= amount
            flow[v] += amount
            self.flow_E[expert] = flow
        self.load_D[device] -= amount
        self.load_D[end] += amount
