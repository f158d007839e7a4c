"""Local search over several cases at once, with the per-batch split as recourse (eq. 6 to 8).

A move is judged by the layer's cost over all cases; the flows of all cases are balanced together, one unit at a time,
in vectors over cases.
"""

from __future__ import annotations

import random

import numpy as np

from .fields import FloatArray
from .layout import Layout, flow_of
from .problem import Objective
from .risk import risk
from .units import LayerProblem

SWEEPS = 6
"""Passes over the shared units when a move is judged."""


class Cases:
    """Replicas, and their tokens in every case."""

    def __init__(self, layer: LayerProblem, layout: Layout) -> None:
        self.layer = layer
        self.on: list[list[int]] = [[] for _ in range(layer.units)]
        for u, d in zip(layout.unit_R.tolist(), layout.device_R.tolist(), strict=True):
            self.on[u].append(d)

    def times(self, sweeps: int) -> FloatArray:
        """Time of every device in every case, shape (D, C), under (nearly) the best split."""
        layer, rate = self.layer, self.layer.token_s_D
        share_UD = np.zeros((layer.units, layer.devices))
        for u, devices in enumerate(self.on):
            share_UD[u, devices] = 1.0 / len(devices)
        read_D = np.where(share_UD > 0, layer.read_UD, 0.0).sum(axis=0)
        time_DC: FloatArray = np.ascontiguousarray((layer.base_CD + read_D + layer.tokens_CU @ share_UD * rate).T)
        shared = [(u, devices) for u, devices in enumerate(self.on) if len(devices) > 1]
        amounts = [np.tile(layer.tokens_CU[:, u] / len(devices), (len(devices), 1)) for u, devices in shared]
        for _ in range(sweeps):
            for (_, devices), amount_KC in zip(shared, amounts, strict=True):
                if len(devices) == 2:
                    _level_two(time_DC, amount_KC, devices, rate)
                else:
                    _level_ring(time_DC, amount_KC, devices, rate)
        return time_DC


def _level_two(time_DC: FloatArray, amount_KC: FloatArray, devices: list[int], rate: FloatArray) -> None:
    a, b = devices
    moved_C = (time_DC[a] - time_DC[b]) * (1.0 / (rate[a] + rate[b]))
    np.minimum(moved_C, amount_KC[0], out=moved_C)
    np.maximum(moved_C, -amount_KC[1], out=moved_C)
    amount_KC[0] -= moved_C
    amount_KC[1] += moved_C
    time_DC[a] -= rate[a] * moved_C
    time_DC[b] += rate[b] * moved_C


def _level_ring(time_DC: FloatArray, amount_KC: FloatArray, devices: list[int], rate: FloatArray) -> None:
    """Neighbouring pairs of the unit's devices, one after the other."""
    for k in range(len(devices)):
        pair = [k, (k + 1) % len(devices)]
        two_KC = amount_KC[pair]
        _level_two(time_DC, two_KC, [devices[i] for i in pair], rate)
        amount_KC[pair] = two_KC


class RobustSearch:
    """Exchanges and replacements of replicas, accepted when the cost over all cases falls."""

    def __init__(self, layer: LayerProblem, layout: Layout, objective: Objective, seed: int) -> None:
        self.layer = layer
        self.objective = objective
        self.random = random.Random(seed)
        self.cases = Cases(layer, layout)
        self.time_DC = self.cases.times(SWEEPS)
        self.cost_s = self._cost(self.time_DC)

    def layout(self) -> Layout:
        """The replicas, with shares balanced for the mean loads."""
        layer, on = self.layer, self.cases.on
        unit_R = np.array([u for u, devices in enumerate(on) for _ in devices])
        device_R = np.array([d for devices in on for d in devices])
        flow = flow_of(layer, unit_R, device_R, layer.tokens_U, layer.base_D)
        flow.settle(range(layer.devices), 1e-6 * max(flow.time))
        return Layout(unit_R, device_R, np.array(flow.amount))

    def run(self, moves: int) -> int:
        """Try that many moves; returns how many were accepted."""
        return sum(self._try() for _ in range(moves))

    def _cost(self, time_DC: FloatArray) -> float:
        layer = self.layer
        return risk(layer.scenario_C, layer.case_weight_C, time_DC.max(axis=0), self.objective.tail)

    def _try(self) -> bool:
        """Relieve the slowest device of one case (chosen by weight times excess) by a random legal move."""
        worst_C = self.time_DC.max(axis=0)
        excess_C = self.layer.case_weight_C * (worst_C - self.time_DC.mean(axis=0)) + 1e-300
        c = self.random.choices(range(len(worst_C)), excess_C.tolist())[0]
        a = int(self.time_DC[:, c].argmax())
        b = self._receiver(a, c)
        on = self.cases.on
        mine = [u for u, devices in enumerate(on) if a in devices and b not in devices]
        theirs = [u for u, devices in enumerate(on) if b in devices and a not in devices]
        if not mine or not theirs:
            return False
        u = self.random.choices(mine, [float(self.layer.tokens_CU[c, m]) + 1e-300 for m in mine])[0]
        v = self.random.choice(theirs)
        before = {x: list(on[x]) for x in (u, v)}
        if len(on[v]) > 1 and self.random.random() < 0.5:
            on[v].remove(b)
            on[u].append(b)
        else:
            on[u][on[u].index(a)] = b
            on[v][on[v].index(b)] = a
        return self._judge(before, (a, b))

    def _receiver(self, a: int, c: int) -> int:
        """Another device; the less busy in this case, the likelier."""
        time_D = self.time_DC[:, c]
        slack = [float(time_D[a] - t) + 1e-3 * float(time_D[a]) if d != a else 0.0 for d, t in enumerate(time_D)]
        return self.random.choices(range(len(slack)), slack)[0]

    def _judge(self, before: dict[int, list[int]], devices: tuple[int, int]) -> bool:
        if self.layer.plain or self._keeps_rules(list(before), devices):
            time_DC = self.cases.times(SWEEPS)
            cost = self._cost(time_DC)
            if cost < self.cost_s * (1.0 - 1e-9):
                self.time_DC, self.cost_s = time_DC, cost
                return True
        for x, on in before.items():
            self.cases.on[x] = on
        return False

    def _keeps_rules(self, units: list[int], devices: tuple[int, int]) -> bool:
        layer, on = self.layer, self.cases.on
        for u in units:
            if not layer.allowed_UD[u, on[u]].all() or not set(np.flatnonzero(layer.pinned_UD[u])) <= set(on[u]):
                return False
            if len(set(layer.node_D[on[u]].tolist())) < layer.min_nodes:
                return False
        for d in devices:
            here = [u for u in range(layer.units) if d in on[u]]
            if layer.width_U[here].sum() > layer.slots_D[d] or layer.bytes_U[here].sum() > layer.budget_D[d]:
                return False
        return True
