"""Local search over several cases at once, with the per-batch split as recourse (eq. 6 to 8).

A move is judged by the layer's cost over all cases; the flows of all cases are balanced together, one unit at a time,
in vectors over cases, from where they were before the move.
"""

from __future__ import annotations

import random
from collections import deque
from itertools import pairwise

import numpy as np

from .fields import FloatArray, IntArray
from .layout import Layout, flow_of
from .problem import Objective
from .risk import risk
from .units import LayerProblem

FIRST_SWEEPS = 12
SWEEPS = 2
"""Passes over the shared units at the start, and when a move is judged."""
LATE = 60
"""Moves ago with whose cost a move is compared."""


class Cases:
    """Replicas and their tokens in every case; moves keep the number of replicas."""

    def __init__(self, layer: LayerProblem, layout: Layout) -> None:
        self.layer = layer
        self.unit_R: IntArray = layout.unit_R.copy()
        self.device_R: IntArray = layout.device_R.copy()
        count_U = np.bincount(self.unit_R, minlength=layer.units)
        self.amount_RC = layer.tokens_CU.T[self.unit_R] / count_U[self.unit_R][:, None]
        self.rows: list[list[int]] = [[] for _ in range(layer.units)]
        for r, u in enumerate(self.unit_R.tolist()):
            self.rows[u].append(r)

    def row(self, unit: int, device: int) -> int:
        """The replica of a unit on a device."""
        return next(r for r in self.rows[unit] if self.device_R[r] == device)

    def times(self, sweeps: int) -> FloatArray:
        """Time of every device in every case, shape (D, C), after moving shares to (nearly) the best ones."""
        layer, device_R = self.layer, self.device_R
        rate_DR = np.zeros((layer.devices, len(device_R)))
        rate_DR[device_R, np.arange(len(device_R))] = layer.token_s_D[device_R]
        read_D = np.bincount(device_R, weights=layer.read_UD[self.unit_R, device_R], minlength=layer.devices)
        time_DC: FloatArray = rate_DR @ self.amount_RC + layer.base_CD.T + read_D[:, None]
        shared = [rows for rows in self.rows if len(rows) > 1]
        for _ in range(sweeps):
            for rows in shared:
                for a, b in pairwise(rows):
                    self._level(time_DC, a, b)
        return time_DC

    def _level(self, time_DC: FloatArray, a: int, b: int) -> None:
        """Share two replicas' tokens so that their devices finish together, or as nearly as they allow."""
        from_a, from_b = self.amount_RC[a], self.amount_RC[b]
        device_a, device_b = self.device_R[a], self.device_R[b]
        rate_a, rate_b = self.layer.token_s_D[device_a], self.layer.token_s_D[device_b]
        moved_C = (time_DC[device_a] - time_DC[device_b]) * (1.0 / (rate_a + rate_b))
        np.minimum(moved_C, from_a, out=moved_C)
        np.maximum(moved_C, -from_b, out=moved_C)
        from_a -= moved_C
        from_b += moved_C
        time_DC[device_a] -= rate_a * moved_C
        time_DC[device_b] += rate_b * moved_C

    def replace(self, row: int, unit: int) -> None:
        """Turn a replica of a shared unit into one of another unit, without tokens yet."""
        old = int(self.unit_R[row])
        self.rows[old].remove(row)
        self.amount_RC[self.rows[old]] += self.amount_RC[row] / len(self.rows[old])
        self.amount_RC[row] = 0.0
        self.rows[unit].append(row)
        self.unit_R[row] = unit


class RobustSearch:
    """Exchanges and replacements of replicas, judged by the cost over all cases; keeps the best layout met.

    A move is accepted that costs no more than the layout before it, or less than the one `LATE` moves ago (late
    acceptance, Burke and Bykov 2017): few exchanges pay at once where all cases count.
    """

    def __init__(self, layer: LayerProblem, layout: Layout, objective: Objective, seed: int) -> None:
        self.layer = layer
        self.objective = objective
        self.random = random.Random(seed)
        self.cases = Cases(layer, layout)
        self.time_DC = self.cases.times(FIRST_SWEEPS)
        self.cost_s = self.best_s = self._cost(self.time_DC)
        self._best = self._saved()
        self._late_s = deque([self.cost_s] * LATE, LATE)

    def layout(self) -> Layout:
        """The best replicas met, with shares balanced for the mean loads."""
        layer, (unit_R, device_R, _, _) = self.layer, self._best
        flow = flow_of(layer, unit_R, device_R, layer.tokens_U, layer.base_D)
        flow.settle(range(layer.devices), 1e-6 * max(flow.time))
        return Layout(unit_R.copy(), device_R.copy(), np.array(flow.amount))

    def run(self, moves: int) -> int:
        """Try that many moves; returns how many led to the best layout so far."""
        return sum(self._try() for _ in range(moves))

    def _cost(self, time_DC: FloatArray) -> float:
        layer = self.layer
        return risk(layer.scenario_C, layer.case_weight_C, time_DC.max(axis=0), self.objective.tail)

    def _try(self) -> bool:
        """Relieve the slowest device of one case, chosen by weight times excess, by a random move."""
        layer, cases = self.layer, self.cases
        excess_C = layer.case_weight_C * (self.time_DC.max(axis=0) - self.time_DC.mean(axis=0)) + 1e-300
        c = self.random.choices(range(len(excess_C)), excess_C.tolist())[0]
        a = int(self.time_DC[:, c].argmax())
        b = self._receiver(a, c)
        on_a, on_b = set(cases.unit_R[cases.device_R == a].tolist()), set(cases.unit_R[cases.device_R == b].tolist())
        mine, theirs = sorted(on_a - on_b), sorted(on_b - on_a)
        if not mine or not theirs:
            return False
        u = self.random.choices(mine, [float(layer.tokens_CU[c, m]) + 1e-300 for m in mine])[0]
        v = self.random.choice(theirs)
        before = self._saved()
        row_v = cases.row(v, b)
        if len(cases.rows[v]) > 1 and self.random.random() < 0.5:
            cases.replace(row_v, u)
        else:
            cases.device_R[cases.row(u, a)] = b
            cases.device_R[row_v] = a
        return self._judge(before, (u, v), (a, b))

    def _receiver(self, a: int, c: int) -> int:
        """Another device; the less busy in this case, the likelier."""
        time_D = self.time_DC[:, c]
        slack = [float(time_D[a] - t) + 1e-3 * float(time_D[a]) if d != a else 0.0 for d, t in enumerate(time_D)]
        return self.random.choices(range(len(slack)), slack)[0]

    def _saved(self) -> tuple[IntArray, IntArray, FloatArray, list[list[int]]]:
        cases = self.cases
        return cases.unit_R.copy(), cases.device_R.copy(), cases.amount_RC.copy(), [list(r) for r in cases.rows]

    def _judge(
        self,
        before: tuple[IntArray, IntArray, FloatArray, list[list[int]]],
        units: tuple[int, int],
        devices: tuple[int, int],
    ) -> bool:
        if self.layer.plain or self._keeps_rules(units, devices):
            time_DC = self.cases.times(SWEEPS)
            if self._accept(time_DC, self._cost(time_DC)):
                return self._is_best()
        cases = self.cases
        cases.unit_R, cases.device_R, cases.amount_RC, cases.rows = before
        return False

    def _accept(self, time_DC: FloatArray, cost_s: float) -> bool:
        accepted = cost_s <= self.cost_s or cost_s < self._late_s[0]
        if accepted:
            self.time_DC, self.cost_s = time_DC, cost_s
        self._late_s.append(self.cost_s)
        return accepted

    def _is_best(self) -> bool:
        if self.cost_s >= self.best_s * (1.0 - 1e-9):
            return False
        self.best_s, self._best = self.cost_s, self._saved()
        return True

    def _keeps_rules(self, units: tuple[int, int], devices: tuple[int, int]) -> bool:
        layer, cases = self.layer, self.cases
        for u in units:
            on = cases.device_R[cases.rows[u]]
            pinned = set(np.flatnonzero(layer.pinned_UD[u]).tolist())
            if not layer.allowed_UD[u, on].all() or not pinned <= set(on.tolist()):
                return False
            if len(set(layer.node_D[on].tolist())) < layer.min_nodes:
                return False
        for d in devices:
            here = cases.unit_R[cases.device_R == d]
            if layer.width_U[here].sum() > layer.slots_D[d] or layer.bytes_U[here].sum() > layer.budget_D[d]:
                return False
        return True
