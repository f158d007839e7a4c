"""The placement problem as one immutable value: where replicas may go, and what a placement costs.

Equation numbers are those of ``planners/README.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .cluster import Cluster
from .fields import BoolArray, FloatArray, IntArray, choice, fail, finite
from .model import Loads, ModelSpec
from .placement import Placement


@dataclass(frozen=True)
class Regime:
    """One way of running a step, for instance decode or prefill.

    Parameters
    ----------
    name : str
    weight : float
        Its part of the objective (relative; weights are normalised).
    token_scale : float
        Factor on `Loads.tokens_SLE`: a prefill step carries many times the tokens of a decode step.
    """

    name: str = "step"
    weight: float = 1.0
    token_scale: float = 1.0

    def __post_init__(self) -> None:
        finite(f"regime {self.name!r}: weight", self.weight)
        finite(f"regime {self.name!r}: token_scale", self.token_scale)


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Parameters
    ----------
    regimes : tuple of Regime
    tail : float
        0: the expected cost over scenarios. In (0, 1): the mean of the worst ``1 - tail`` part (CVaR), eq. 8.
    split : {"fixed", "per_batch"}
        Whether shares are one for all scenarios, or re-optimised for every batch (eq. 6), as the workers can do.
    """

    regimes: tuple[Regime, ...] = (Regime(),)
    tail: float = 0.0
    split: str = "fixed"

    def __post_init__(self) -> None:
        if not self.regimes or sum(r.weight for r in self.regimes) <= 0:
            fail("objective: regimes", self.regimes, "at least one regime with a positive weight")
        finite("objective: tail", self.tail, 0.0, 1.0)
        if self.tail == 1.0:
            fail("objective: tail", self.tail, "less than 1")
        choice("objective: split", self.split, ("fixed", "per_batch"))


@dataclass(frozen=True, slots=True)
class Pair:
    """An expert and a device, in one layer or (``layer=None``) in all."""

    expert: int
    device: str
    layer: int | None = None


@dataclass(frozen=True)
class Options:
    """Rules a placement must keep.

    Parameters
    ----------
    memory_reserve_bytes : int
        Kept free on every device.
    min_nodes : int
        Every expert has replicas on at least so many different nodes.
    pinned, forbidden : tuple of Pair
        Replicas that must, or must not, exist.
    groups : tuple of tuple of int
        Experts that stay together: every device holds all or none of a group (Pangu's grouped experts).
    """

    memory_reserve_bytes: int = 0
    min_nodes: int = 1
    pinned: tuple[Pair, ...] = ()
    forbidden: tuple[Pair, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Prices:
    """What moving costs: objective seconds per byte of a replica that is not in the current placement (eq. 9)."""

    moved_byte_s: float = 0.0


@dataclass(frozen=True, eq=False)
class PlacementProblem:
    """Cluster, model, loads and rules; validated once, never changed.

    Parameters
    ----------
    cluster : Cluster
    model : ModelSpec
    loads : Loads
    slots : None, int, or integers of shape (D,) or (L, D)
        Most replicas per layer and device; None leaves memory as the only limit.
    current : Placement or None
        Where replicas are now (devices are matched by name; unknown ones are gone).
    prices, options, objective
        See their classes.

    Raises
    ------
    OperatorError
        A field does not fit the others; the message names field, value and expectation.
    """

    cluster: Cluster
    model: ModelSpec
    loads: Loads
    slots: int | IntArray | None = None
    current: Placement | None = None
    prices: Prices = field(default_factory=Prices)
    options: Options = field(default_factory=Options)
    objective: Objective = field(default_factory=Objective)

    def __post_init__(self) -> None:
        shape = (self.model.layers, self.model.experts)
        if self.loads.tokens_SLE.shape[1:] != shape:
            fail("loads: tokens_SLE", self.loads.tokens_SLE.shape, f"shape (scenarios, {shape[0]}, {shape[1]})")
        finite("prices: moved_byte_s", self.prices.moved_byte_s)
        self._check_slots()
        self._check_current()
        self._check_options()

    def _check_slots(self) -> None:
        if self.slots is None:
            return
        slots = np.asarray(self.slots)
        shapes = ((), (self.devices,), (self.layers, self.devices))
        if slots.shape not in shapes or not np.issubdtype(slots.dtype, np.integer) or (slots < 0).any():
            fail("slots", self.slots, f"integers >= 0 of shape (), ({self.devices},) or {shapes[2]}")
        frozen = slots.astype(np.int64)
        frozen.setflags(write=False)
        object.__setattr__(self, "slots", frozen)

    def _check_current(self) -> None:
        if self.current is None:
            return
        got = (self.current.layers, self.current.experts)
        if got != (self.layers, self.experts):
            fail("current", f"{got[0]} layers of {got[1]} experts", f"{self.layers} of {self.experts}")

    def _check_options(self) -> None:
        finite("options: memory_reserve_bytes", self.options.memory_reserve_bytes)
        finite("options: min_nodes", self.options.min_nodes, 1)
        for kind, pairs in (("pinned", self.options.pinned), ("forbidden", self.options.forbidden)):
            for pair in pairs:
                self._check_pair(f"options: {kind}", pair)
        members = [e for group in self.options.groups for e in group]
        if len(set(members)) != len(members) or any(not 0 <= e < self.experts for e in members):
            fail("options: groups", self.options.groups, f"disjoint groups of experts in 0..{self.experts - 1}")

    def _check_pair(self, where: str, pair: Pair) -> None:
        if not 0 <= pair.expert < self.experts:
            fail(f"{where}: expert", pair.expert, f"0..{self.experts - 1}")
        if pair.device not in self.cluster.index:
            fail(f"{where}: device", pair.device, f"one of {self.cluster.names}")
        if pair.layer is not None and not 0 <= pair.layer < self.layers:
            fail(f"{where}: layer", pair.layer, f"0..{self.layers - 1} or None")

    @property
    def layers(self) -> int:
        return self.model.layers

    @property
    def experts(self) -> int:
        return self.model.experts

    @property
    def devices(self) -> int:
        return len(self.cluster.devices)

    @cached_property
    def usable_bytes_D(self) -> FloatArray:
        """Memory for routed experts: the device's, less the reserve and the shared experts; at least 0."""
        taken = self.options.memory_reserve_bytes + self.model.shared_bytes * self.layers
        return np.maximum(self.cluster.memory_bytes_D - taken, 0.0)

    @cached_property
    def _wanted_slots_LD(self) -> IntArray:
        given = np.asarray(self.experts if self.slots is None else self.slots)
        return np.broadcast_to(np.minimum(given, self.experts), (self.layers, self.devices)).astype(np.int64)

    @cached_property
    def _roomy_D(self) -> BoolArray:
        """Devices whose memory takes every slot filled with the layer's biggest expert: memory never binds there."""
        roomy_D: BoolArray = self.model.bytes_LE.max(axis=1) @ self._wanted_slots_LD <= self.usable_bytes_D
        return roomy_D

    @cached_property
    def slots_LD(self) -> IntArray:
        """Most replicas per layer and device, from ``slots`` and memory together (eq. 2, 3)."""
        wanted = self._wanted_slots_LD
        slots_LD: IntArray = np.where(self._roomy_D, wanted, np.minimum(wanted, self._slots_by_memory_LD))
        return slots_LD

    @cached_property
    def budget_bytes_LD(self) -> FloatArray:
        """Most bytes of experts per layer and device (eq. 3): memory in proportion to the layers' bytes."""
        layer_bytes_L = self.model.bytes_LE.sum(axis=1)
        part_LD = np.outer(layer_bytes_L / layer_bytes_L.sum(), self.usable_bytes_D)
        by_slots_LD = self.slots_LD * self.model.bytes_LE.max(axis=1)[:, None]
        budget_LD: FloatArray = np.where(self._roomy_D | self._equal_experts, by_slots_LD, part_LD)
        return budget_LD

    @property
    def _equal_experts(self) -> bool:
        return bool(self.model.bytes_LE.min() == self.model.bytes_LE.max())

    @cached_property
    def _slots_by_memory_LD(self) -> IntArray:
        smallest_L = self.model.bytes_LE.min(axis=1)
        if self._equal_experts:
            most = self.experts * self.layers
            count_D = np.minimum(self.usable_bytes_D // smallest_L[0], most).astype(np.int64)
            turn_LD = (np.arange(self.layers)[:, None] + np.arange(self.devices)) % self.layers
            slots_LD: IntArray = count_D // self.layers + (turn_LD < count_D % self.layers)
            return slots_LD
        layer_bytes_L = self.model.bytes_LE.sum(axis=1)
        part_LD = np.outer(layer_bytes_L / layer_bytes_L.sum(), self.usable_bytes_D)
        fit_LD: IntArray = (part_LD // smallest_L[:, None]).astype(np.int64)
        return fit_LD

    @cached_property
    def forbidden_LED(self) -> BoolArray:
        return self._mask(self.options.forbidden)

    @cached_property
    def pinned_LED(self) -> BoolArray:
        return self._mask(self.options.pinned)

    def _mask(self, pairs: tuple[Pair, ...]) -> BoolArray:
        mask = np.zeros((self.layers, self.experts, self.devices), dtype=np.bool_)
        for pair in pairs:
            layers = slice(None) if pair.layer is None else pair.layer
            mask[layers, pair.expert, self.cluster.index[pair.device]] = True
        return mask

    @cached_property
    def held_LED(self) -> BoolArray:
        """Replicas of the current placement on devices that are still here."""
        held = np.zeros((self.layers, self.experts, self.devices), dtype=np.bool_)
        if self.current is None:
            return held
        here = [self.cluster.index.get(name, -1) for name in self.current.devices]
        for layer, experts in enumerate(self.current.replicas_LE):
            for expert, replicas in enumerate(experts):
                for r in replicas:
                    if here[r.device] >= 0:
                        held[layer, expert, here[r.device]] = True
        return held
