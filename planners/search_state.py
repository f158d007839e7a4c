"""A layer's replicas while they are moved about: who is where, what is free, and balanced shares."""

from __future__ import annotations

import numpy as np

from .fields import BoolArray, FloatArray, IntArray
from .flow import Flow
from .layout import Layout, flow_of
from .units import LayerProblem


class SearchState:
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

    def component_time(self, inside_D: BoolArray, device_I: IntArray, change_I: FloatArray) -> FloatArray:
        """Time of the component once ``change_I`` seconds on a device have spread over it."""
        weight_D = 1.0 / self.layer.token_s_D
        spread: FloatArray = self.time_s + change_I * (weight_D[device_I] / weight_D[inside_D].sum())
        return spread

    def put(self, replica: int, a: int, b: int) -> None:
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

    def grow(self, unit: int, device: int) -> None:
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

    def rebalance(self, *devices: int) -> None:
        for d in devices:
            self.flow.recount(d)
        self.flow.settle(sorted(devices), self.tolerance_s)
