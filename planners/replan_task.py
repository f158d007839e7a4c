"""One layer's re-planning task: what is there, what fits, and the fewest bytes that any answer must copy.

Loads, capacities and reads are in tokens: a device's step time divided by its seconds per token. Where the target
step time T gives device d the capacity ``T / seconds_per_token[d]``, an answer within all capacities has a step time
of at most T (eq. 4 of ``planners/README.md``). An "expert" here may be a group of experts that stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .fields import BoolArray
from .routing import Routing
from .units import LayerProblem

Pair = tuple[int, int]  # (expert, device)


@dataclass(frozen=True)
class LayerTask:
    """What has to be placed.

    Parameters
    ----------
    tokens_E, bytes_E : sequences of float
        Load and weight of each expert.
    read_ED : sequence of sequences of float
        Tokens a device could do in the time it reads the expert's weights.
    capacity_D : sequence of float
        Tokens each device can do in the target step time, before reads.
    width_E : sequence of int
        Slots that a replica takes.
    slots_D : sequence of int
        Slots of each device.
    kept_E : tuple of frozenset of int
        Devices that hold each expert now and may go on doing so.
    forbidden_E, pinned_E : tuples of frozenset of int
        Devices where a replica must not, or must, be.
    node_D : sequence of int
    min_nodes : int
        Every expert has replicas on at least so many nodes.
    budget_D : sequence of float, optional
        Most bytes per device, where experts differ in size.
    """

    tokens_E: Sequence[float]
    bytes_E: Sequence[float]
    read_ED: Sequence[Sequence[float]]
    capacity_D: Sequence[float]
    width_E: Sequence[int]
    slots_D: Sequence[int]
    kept_E: tuple[frozenset[int], ...]
    forbidden_E: tuple[frozenset[int], ...]
    pinned_E: tuple[frozenset[int], ...]
    node_D: Sequence[int]
    min_nodes: int = 1
    budget_D: Sequence[float] | None = None

    @property
    def devices(self) -> int:
        return len(self.capacity_D)

    @property
    def experts(self) -> int:
        return len(self.tokens_E)

    @classmethod
    def of(cls, layer: LayerProblem, time_s: float) -> LayerTask:
        """The task of keeping ``layer`` (its mean loads) below a step time of ``time_s``."""
        tokens_per_s_D = 1.0 / layer.token_s_D
        per_slot_U = layer.bytes_U / layer.width_U
        equal = bool((per_slot_U == per_slot_U[0]).all())
        return cls(
            tokens_E=layer.tokens_U.tolist(),
            bytes_E=layer.bytes_U.tolist(),
            read_ED=(layer.read_UD * tokens_per_s_D).tolist(),
            capacity_D=((time_s - layer.base_D) * tokens_per_s_D).tolist(),
            width_E=layer.width_U.tolist(),
            slots_D=layer.slots_D.tolist(),
            kept_E=_devices(layer.held_UD & layer.allowed_UD),
            forbidden_E=_devices(~layer.allowed_UD),
            pinned_E=_devices(layer.pinned_UD),
            node_D=layer.node_D.tolist(),
            min_nodes=layer.min_nodes,
            budget_D=None if equal else layer.budget_D.tolist(),
        )

    @cached_property
    def mean_capacity(self) -> float:
        return sum(self.capacity_D) / self.devices

    def cost_bytes(self, expert: int, device: int) -> float:
        """Bytes to copy for a replica: none where it is already."""
        return 0.0 if device in self.kept_E[expert] else self.bytes_E[expert]

    def new_replicas(self, state: Routing) -> list[Pair]:
        return [(e, d) for e, flow in enumerate(state.flow_E) for d in flow if d not in self.kept_E[e]]

    def new_bytes(self, state: Routing) -> float:
        return sum(self.bytes_E[e] for e, _ in self.new_replicas(state))

    @cached_property
    def _narrow(self) -> bool:
        return all(w == 1 for w in self.width_E)

    def slots_used(self, state: Routing, device: int) -> int:
        held = state.held_D[device]
        return len(held) if self._narrow else sum(self.width_E[e] for e in held)

    def fits(self, state: Routing, device: int, more: Sequence[int] = ()) -> bool:
        """Whether the device's replicas, and ``more``, keep its slots and bytes."""
        if self.slots_used(state, device) + sum(self.width_E[e] for e in more) > self.slots_D[device]:
            return False
        if self.budget_D is None:
            return True
        held = sum(self.bytes_E[e] for e in state.held_D[device]) + sum(self.bytes_E[e] for e in more)
        return held <= self.budget_D[device]

    def may_drop(self, state: Routing, expert: int, device: int) -> bool:
        """Whether others serve the expert, on enough nodes, and it is not pinned."""
        flow = state.flow_E[expert]
        if len(flow) < 2 or device in self.pinned_E[expert]:
            return False
        return self.min_nodes == 1 or len({self.node_D[d] for d in flow if d != device}) >= self.min_nodes

    def spare(self, state: Routing, device: int) -> list[int]:
        """Experts whose replica on ``device`` may go."""
        return [e for e in state.held_D[device] if self.may_drop(state, e, device)]

    def least_useful(self, state: Routing, device: int) -> int:
        """The spare replica whose going leaves its expert's others with the least load each."""
        return min(self.spare(state, device), key=lambda e: (self.tokens_E[e] / (len(state.flow_E[e]) - 1), e))

    def least_bytes(self) -> float:
        """A lower bound on the bytes that any answer within the capacities copies.

        Experts without a replica are copied whatever else happens. Tokens beyond the capacity of the devices that hold
        anything now must be served by new replicas, which carry at most their expert's tokens: the fewest bytes
        for them are those of a fractional knapsack.
        """
        lost = [e for e in range(self.experts) if not self.kept_E[e]]
        held = {d for devices in self.kept_E for d in devices}
        beyond = sum(self.tokens_E) - sum(max(0.0, self.capacity_D[d]) for d in held)
        beyond -= sum(self.tokens_E[e] for e in lost)
        total = sum(self.bytes_E[e] for e in lost)
        order = sorted(range(self.experts), key=lambda e: -self.tokens_E[e] / self.bytes_E[e])
        for e in order:
            if beyond <= 0:
                break
            if self.kept_E[e] and self.tokens_E[e] > 0:
                total += self.bytes_E[e] * min(1.0, beyond / self.tokens_E[e])
                beyond -= self.tokens_E[e]
        return total


def _devices(mask_UD: BoolArray) -> tuple[frozenset[int], ...]:
    return tuple(frozenset(np.flatnonzero(row).tolist()) for row in mask_UD)


@dataclass(frozen=True, slots=True)
class Change:
    """Replicas to remove, then to add; ``gain`` estimates the tokens relieved."""

    add: tuple[Pair, ...] = ()
    remove: tuple[Pair, ...] = ()
    gain: float = 0.0

    def applied(self, state: Routing) -> Routing:
        after = state.copy()
        for e, d in self.remove:
            after.remove(e, d)
        for e, d in self.add:
            after.add(e, d)
        return after


def with_room(task: LayerTask, state: Routing, expert: int, device: int) -> Change | None:
    """A new replica with as many removals as it needs there; None where it cannot be had."""
    if device in state.flow_E[expert] or device in task.forbidden_E[expert]:
        return None
    removed: list[Pair] = []
    trial = state
    while not task.fits(trial, device, (expert,)):
        if not task.spare(trial, device):
            return None
        out = task.least_useful(trial, device)
        removed.append((out, device))
        trial = Change(remove=((out, device),)).applied(trial)
    return Change(((expert, device),), tuple(removed))
