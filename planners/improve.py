"""Local search on one layout: exchange replicas between the slowest devices and the others, then rebalance shares.

The slowest devices are a whole component (`Flow.component`): devices joined by replicas whose tokens could only go to
each other. Relieving one of them relieves all, because the shares flow.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .fields import BoolArray, FloatArray, IntArray
from .layout import Layout
from .repartition import MOST_FREE, best_deal, best_trio
from .search_state import SearchState
from .trios import best_of_trios
from .units import LayerProblem

FEW_HELD = 3
MEMBERS = 4
PARTNERS = 12
"""Replicas up to which so many devices of the slowest component are re-partitioned with pairs of so many others."""
MOST_FROM = 64
"""Replicas of the slowest component that one round looks at."""


@dataclass(frozen=True, slots=True)
class Effort:
    """What a round spends once plain exchanges no longer help.

    Parameters
    ----------
    probes : int
        Exchanges of shared replicas that are carried out to see what the shares make of them.
    trios : int
        Random trios of devices that are re-partitioned exactly.
    seed : int
        Of the choice of trios.
    """

    probes: int = 12
    trios: int = 4
    seed: int = 0


class Search(SearchState):
    """Moves that lower the slowest time, tried in order of what they take to look for."""

    def __init__(self, layer: LayerProblem, layout: Layout, effort: Effort | None = None) -> None:
        super().__init__(layer, layout)
        self.effort = effort or Effort()
        self.random = random.Random(self.effort.seed)
        self._exchanges = _no_exchanges()

    def run(self, bound_s: float, gap: float, rounds: int) -> int:
        """Improve until within ``gap`` of the bound, stuck, or out of rounds; returns rounds used."""
        for done in range(rounds):
            if self.time_s * (1.0 - gap) <= bound_s or not self._round():
                return done
        return rounds

    def _round(self) -> bool:
        flow = self.flow
        time_D = np.array(flow.time)
        slowest = int(time_D.argmax())
        inside_D = np.zeros(self.layer.devices, dtype=np.bool_)
        inside_D[list(flow.component(slowest))] = True
        device_R, tokens_R = np.array(flow.device), np.array(flow.amount)
        from_I = np.flatnonzero(inside_D[device_R])
        from_I = from_I[np.argsort(-tokens_R[from_I], kind="stable")][:MOST_FROM]
        return (
            self._swap(time_D, inside_D, device_R, tokens_R, from_I)
            or self._move(time_D, inside_D, device_R, tokens_R, from_I)
            or self._deal(time_D, inside_D, slowest)
            or self._probe()
            or self._trios(time_D, inside_D)
            or self._trio(time_D, inside_D, slowest)
            or self._add(time_D, inside_D, device_R, tokens_R, from_I)
        )

    def _swap(
        self, time_D: FloatArray, inside_D: BoolArray, device_R: IntArray, tokens_R: FloatArray, from_I: IntArray
    ) -> bool:
        """Exchange a replica of the component with one outside, if that lowers the maximum."""
        layer, to_J = self.layer, np.flatnonzero(~inside_D[device_R])
        self._exchanges = _no_exchanges()  # those of an earlier round may be illegal by now
        if len(to_J) == 0:
            return False
        a_I, b_J = device_R[from_I], device_R[to_J]
        u_I, u_J = self.unit_R[from_I], self.unit_R[to_J]
        less_IJ = tokens_R[from_I][:, None] - tokens_R[to_J]
        rate_D, read_UD = layer.token_s_D, layer.read_UD
        down_IJ = less_IJ * rate_D[a_I][:, None] + (read_UD[u_I, a_I][:, None] - read_UD[u_J][:, a_I].T)
        up_IJ = less_IJ * rate_D[b_J] + (read_UD[u_I][:, b_J] - read_UD[u_J, b_J])
        worst_IJ = np.maximum(self.component_time(inside_D, a_I[:, None], -down_IJ), time_D[b_J] + up_IJ)
        worst_IJ[self.has_UD[u_J][:, a_I].T | self.has_UD[u_I][:, b_J]] = np.inf
        if not layer.plain:
            worst_IJ[~self._swap_legal(from_I, to_J, device_R)] = np.inf
        self._exchanges = worst_IJ, from_I, to_J
        return self._take(worst_IJ, from_I, to_J)

    def _swap_legal(self, from_I: IntArray, to_J: IntArray, device_R: IntArray) -> BoolArray:
        layer = self.layer
        a_I, b_J, u_I, u_J = device_R[from_I], device_R[to_J], self.unit_R[from_I], self.unit_R[to_J]
        wider = layer.width_U[u_I][:, None] - layer.width_U[u_J]
        heavier = layer.bytes_U[u_I][:, None] - layer.bytes_U[u_J]
        legal: BoolArray = (wider <= self.slots_left_D[b_J]) & (-wider <= self.slots_left_D[a_I][:, None])
        legal &= (heavier <= self.bytes_left_D[b_J]) & (-heavier <= self.bytes_left_D[a_I][:, None])
        legal &= layer.allowed_UD[u_I][:, b_J] & layer.allowed_UD[u_J][:, a_I].T
        legal &= ~layer.pinned_UD[u_I, a_I][:, None] & ~layer.pinned_UD[u_J, b_J]
        if layer.min_nodes > 1:
            legal &= layer.node_D[a_I][:, None] == layer.node_D[b_J]
        return legal

    def _take(self, worst_IJ: FloatArray, from_I: IntArray, to_J: IntArray) -> bool:
        best = int(worst_IJ.argmin())
        i, j = divmod(best, worst_IJ.shape[1])
        if not worst_IJ[i, j] < self.time_s * (1.0 - 1e-7):
            return False
        r, q = int(from_I[i]), int(to_J[j])
        a, b = self.flow.device[r], self.flow.device[q]
        self.put(r, a, b)
        self.put(q, b, a)
        self.rebalance(a, b)
        return True

    def _move(
        self, time_D: FloatArray, inside_D: BoolArray, device_R: IntArray, tokens_R: FloatArray, from_I: IntArray
    ) -> bool:
        """Move a replica of the component to a free slot outside, if that lowers the maximum."""
        layer, b_J = self.layer, np.flatnonzero(~inside_D & (self.slots_left_D > 0))
        if len(b_J) == 0:
            return False
        a_I, u_I = device_R[from_I], self.unit_R[from_I]
        down_I = tokens_R[from_I] * layer.token_s_D[a_I] + layer.read_UD[u_I, a_I]
        up_IJ = tokens_R[from_I][:, None] * layer.token_s_D[b_J] + layer.read_UD[u_I][:, b_J]
        worst_IJ = np.maximum(self.component_time(inside_D, a_I, -down_I)[:, None], time_D[b_J] + up_IJ)
        illegal = self.has_UD[u_I][:, b_J] | (layer.width_U[u_I][:, None] > self.slots_left_D[b_J])
        if not layer.plain:
            illegal |= (layer.bytes_U[u_I][:, None] > self.bytes_left_D[b_J]) | ~layer.allowed_UD[u_I][:, b_J]
            illegal |= layer.pinned_UD[u_I, a_I][:, None]
            if layer.min_nodes > 1:
                illegal |= layer.node_D[a_I][:, None] != layer.node_D[b_J]
        worst_IJ[illegal] = np.inf
        i, j = divmod(int(worst_IJ.argmin()), len(b_J))
        if not worst_IJ[i, j] < self.time_s * (1.0 - 1e-7):
            return False
        a, b = int(a_I[i]), int(b_J[j])
        self.put(int(from_I[i]), a, b)
        self.rebalance(a, b)
        return True

    def _deal(self, time_D: FloatArray, inside_D: BoolArray, slowest: int) -> bool:
        """Deal out afresh what the slowest device and one outside hold, if that lowers the maximum."""
        if not self.layer.plain:
            return False
        weight_D = 1.0 / self.layer.token_s_D
        outside_B = np.flatnonzero(~inside_D)
        outside_B = outside_B[np.argsort(time_D[outside_B], kind="stable")]
        relief = float(weight_D[slowest] / weight_D[inside_D].sum())
        deal = best_deal(self.layer, self.flow, slowest, outside_B, relief)
        if deal is None:
            return False
        for r in deal.to_b:
            self.put(r, deal.a, deal.b)
        for r in deal.to_a:
            self.put(r, deal.b, deal.a)
        self.rebalance(deal.a, deal.b)
        return True

    def _probe(self) -> bool:
        """Carry out the most promising exchanges of shared replicas, whose shares then shift, until one helps."""
        worst_IJ, from_I, to_J = self._exchanges
        shared_U = np.array([len(replicas) > 1 for replicas in self.flow.replicas])
        shared_IJ = shared_U[self.unit_R[from_I]][:, None] | shared_U[self.unit_R[to_J]]
        flat = np.where(shared_IJ, worst_IJ, np.inf).ravel()
        probes = min(self.effort.probes, flat.size)
        if probes == 0:
            return False
        best = np.argpartition(flat, probes - 1)[:probes]
        for at in best[np.lexsort((best, flat[best]))].tolist():
            i, j = divmod(at, len(to_J))
            if np.isfinite(flat[at]) and self._try_swap(int(from_I[i]), int(to_J[j])):
                return True
        return False

    def _try_swap(self, r: int, q: int) -> bool:
        """Exchange two replicas, and back if the maximum does not fall."""
        flow = self.flow
        before, amount, time = self.time_s, flow.amount.copy(), flow.time.copy()
        a, b = flow.device[r], flow.device[q]
        self.put(r, a, b)
        self.put(q, b, a)
        self.rebalance(a, b)
        if self.time_s < before * (1.0 - 1e-7):
            return True
        self.put(r, b, a)
        self.put(q, a, b)
        flow.amount, flow.time = amount, time
        return False

    def _trios(self, time_D: FloatArray, inside_D: BoolArray) -> bool:
        """Re-partition a device of the component and two others exactly, for many random pairs: where they hold few."""
        outside = np.flatnonzero(~inside_D & (time_D < self.time_s)).tolist()
        inside = [d for d in np.flatnonzero(inside_D).tolist() if 1 < len(self.flow.on[d]) <= FEW_HELD]
        if not self.layer.plain or not self.layer.heavy(self.time_s) or not inside or len(outside) < 2:
            return False
        pairs = list(combinations(self.random.sample(outside, min(PARTNERS, len(outside))), 2))
        weight_D = 1.0 / self.layer.token_s_D
        for a in self.random.sample(inside, min(MEMBERS, len(inside))):
            relief = float(weight_D[a] / weight_D[inside_D].sum())
            dealt = best_of_trios(self.layer, self.flow, a, pairs, relief)
            if dealt is not None:
                for r, x, y in dealt.moves:
                    self.put(r, x, y)
                self.rebalance(*sorted({d for _, *ends in dealt.moves for d in ends}))
                return True
        return False

    def _trio(self, time_D: FloatArray, inside_D: BoolArray, slowest: int) -> bool:
        """Re-partition the slowest device and two others exactly, for a few random pairs with slack."""
        outside = np.flatnonzero(~inside_D).tolist()
        if not self.layer.plain or len(outside) < 2:
            return False
        weight_D = 1.0 / self.layer.token_s_D
        relief = float(weight_D[slowest] / weight_D[inside_D].sum())
        slack = [max(0.0, float(self.time_s - time_D[d])) + 1e-300 for d in outside]
        for _ in range(self.effort.trios):
            b, c = self.random.choices(outside, slack, k=2)
            if b != c and self._deal_trio((slowest, b, c), relief):
                return True
        return False

    def _deal_trio(self, trio: tuple[int, int, int], relief: float) -> bool:
        flow = self.flow
        replicas = [r for d in trio for r in flow.on[d]]
        units = Counter(flow.unit[r] for r in replicas)
        free = [r for r in replicas if units[flow.unit[r]] == 1]
        if len(free) > MOST_FREE:
            free = sorted(self.random.sample(free, MOST_FREE))
        moves = best_trio(self.layer, flow, trio, free, relief) if free else None
        if not moves:
            return False
        for r, a, b in moves:
            self.put(r, a, b)
        self.rebalance(*trio)
        return True

    def _add(
        self, time_D: FloatArray, inside_D: BoolArray, device_R: IntArray, tokens_R: FloatArray, from_I: IntArray
    ) -> bool:
        """Give a unit of the component one more replica outside, if sharing with that device lowers the maximum."""
        layer, b_J = self.layer, np.flatnonzero(~inside_D & (self.slots_left_D > 0))
        b_J = b_J[time_D[b_J] < self.time_s * (1.0 - 1e-7)]
        if len(b_J) == 0:
            return False
        u_I, a_I = self.unit_R[from_I], device_R[from_I]
        weight_D = 1.0 / layer.token_s_D
        inside = float(weight_D[inside_D].sum())
        then_IJ = time_D[b_J] + layer.read_UD[u_I][:, b_J]
        level_IJ = (inside * self.time_s + weight_D[b_J] * then_IJ) / (inside + weight_D[b_J])
        carried_IJ = self.time_s - tokens_R[from_I][:, None] * (1.0 / inside)
        worst_IJ = np.maximum(level_IJ, carried_IJ)
        illegal = self.has_UD[u_I][:, b_J] | (layer.width_U[u_I][:, None] > self.slots_left_D[b_J])
        illegal |= (layer.bytes_U[u_I][:, None] > self.bytes_left_D[b_J]) | ~layer.allowed_UD[u_I][:, b_J]
        worst_IJ[illegal] = np.inf
        i, j = divmod(int(worst_IJ.argmin()), len(b_J))
        if not worst_IJ[i, j] < self.time_s * (1.0 - 1e-7):
            return False
        self.grow(int(u_I[i]), int(b_J[j]))
        self.rebalance(int(a_I[i]), int(b_J[j]))
        return True


def _no_exchanges() -> tuple[FloatArray, IntArray, IntArray]:
    nothing: IntArray = np.zeros(0, dtype=np.int64)
    return np.zeros((0, 0)), nothing, nothing
