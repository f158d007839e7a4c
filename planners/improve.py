"""Local search on one layout: exchange replicas between the slowest devices and the others, then rebalance shares.

The slowest devices are a whole component (`Flow.component`): devices joined by replicas whose tokens could only go to
each other. Relieving one of them relieves all, because the shares flow.
"""

from __future__ import annotations

import numpy as np

from .fields import BoolArray, FloatArray, IntArray
from .flow import Flow
from .layout import Layout, flow_of
from .repartition import best_deal
from .units import LayerProblem

MOST_FROM = 64
"""Replicas of the slowest component that one round looks at."""


class Search:
    """A layout under improvement."""

    def __init__(self, layer: LayerProblem, layout: Layout) -> None:
        self.layer = layer
        self.flow: Flow = flow_of(layer, layout.unit_R, layout.device_R, layer.tokens_U, layer.base_D)
        self.flow.amount = layout.tokens_R.tolist()
        for d in range(layer.devices):
            self.flow.recount(d)
        self.unit_R = layout.unit_R
        self.has_UD = np.zeros((layer.units, layer.devices), dtype=np.bool_)
        self.has_UD[layout.unit_R, layout.device_R] = True
        self.slots_left_D = layer.slots_D - np.bincount(
            layout.device_R, weights=layer.width_U[layout.unit_R], minlength=layer.devices
        ).astype(np.int64)
        self.bytes_left_D = layer.budget_D - np.bincount(
            layout.device_R, weights=layer.bytes_U[layout.unit_R], minlength=layer.devices
        )
        self.tolerance_s = 1e-8 * max(self.flow.time)
        self.flow.settle(range(layer.devices), self.tolerance_s)

    @property
    def time_s(self) -> float:
        return max(self.flow.time)

    def layout(self) -> Layout:
        tokens_R = np.array(self.flow.amount)
        return Layout(self.unit_R, np.array(self.flow.device, dtype=np.int64), tokens_R)

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
            or self._add(time_D, inside_D, device_R, tokens_R, from_I)
        )

    def _component_time(self, inside_D: BoolArray, device_I: IntArray, change_I: FloatArray) -> FloatArray:
        """Time of the component once ``change_I`` seconds on a device have spread over it."""
        weight_D = 1.0 / self.layer.token_s_D
        spread: FloatArray = self.time_s + change_I * (weight_D[device_I] / weight_D[inside_D].sum())
        return spread

    def _swap(
        self, time_D: FloatArray, inside_D: BoolArray, device_R: IntArray, tokens_R: FloatArray, from_I: IntArray
    ) -> bool:
        """Exchange a replica of the component with one outside, if that lowers the maximum."""
        layer, to_J = self.layer, np.flatnonzero(~inside_D[device_R])
        if len(to_J) == 0:
            return False
        a_I, b_J = device_R[from_I], device_R[to_J]
        u_I, u_J = self.unit_R[from_I], self.unit_R[to_J]
        less_IJ = tokens_R[from_I][:, None] - tokens_R[to_J]
        rate_D, read_UD = layer.token_s_D, layer.read_UD
        down_IJ = less_IJ * rate_D[a_I][:, None] + (read_UD[u_I, a_I][:, None] - read_UD[u_J][:, a_I].T)
        up_IJ = less_IJ * rate_D[b_J] + (read_UD[u_I][:, b_J] - read_UD[u_J, b_J])
        worst_IJ = np.maximum(self._component_time(inside_D, a_I[:, None], -down_IJ), time_D[b_J] + up_IJ)
        worst_IJ[self.has_UD[u_J][:, a_I].T | self.has_UD[u_I][:, b_J]] = np.inf
        if not layer.plain:
            worst_IJ[~self._swap_legal(from_I, to_J, device_R)] = np.inf
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
        self._put(r, a, b)
        self._put(q, b, a)
        self._rebalance(a, b)
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
        worst_IJ = np.maximum(self._component_time(inside_D, a_I, -down_I)[:, None], time_D[b_J] + up_IJ)
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
        self._put(int(from_I[i]), a, b)
        self._rebalance(a, b)
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
            self._put(r, deal.a, deal.b)
        for r in deal.to_a:
            self._put(r, deal.b, deal.a)
        self._rebalance(deal.a, deal.b)
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
        self._grow(int(u_I[i]), int(b_J[j]))
        self._rebalance(int(a_I[i]), int(b_J[j]))
        return True

    def _grow(self, unit: int, device: int) -> None:
        """A new replica, without tokens yet."""
        flow, layer = self.flow, self.layer
        replica = len(flow.unit)
        flow.unit.append(unit)
        flow.device.append(device)
        flow.amount.append(0.0)
        flow.replicas[unit].append(replica)
        flow.on[device].append(replica)
        flow.fixed_s[device] += float(layer.read_UD[unit, device])
        self.unit_R = np.append(self.unit_R, unit)
        self.has_UD[unit, device] = True
        self.slots_left_D[device] -= layer.width_U[unit]
        self.bytes_left_D[device] -= layer.bytes_U[unit]

    def _put(self, replica: int, a: int, b: int) -> None:
        """Carry a replica, with its tokens, from device a to device b."""
        flow, unit, layer = self.flow, int(self.unit_R[replica]), self.layer
        flow.on[a].remove(replica)
        flow.on[b].append(replica)
        flow.device[replica] = b
        flow.fixed_s[a] -= float(layer.read_UD[unit, a])
        flow.fixed_s[b] += float(layer.read_UD[unit, b])
        self.has_UD[unit, a], self.has_UD[unit, b] = False, True
        self.slots_left_D[a] += layer.width_U[unit]
        self.slots_left_D[b] -= layer.width_U[unit]
        self.bytes_left_D[a] += layer.bytes_U[unit]
        self.bytes_left_D[b] -= layer.bytes_U[unit]

    def _rebalance(self, a: int, b: int) -> None:
        self.flow.recount(a)
        self.flow.recount(b)
        self.flow.settle((a, b), self.tolerance_s)
