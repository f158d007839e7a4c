"""One layer as arrays for the solvers: groups of experts become units, regimes and scenarios become cases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .fields import BoolArray, FloatArray, IntArray
from .problem import PlacementProblem

HEAVY = 0.05
"""Part of a layer's time above which reading one replica decides what fits on a device."""


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Arrays of one layer; U units, D devices, C cases (scenario by regime).

    Parameters
    ----------
    layer : int
    members : tuple of tuple of int
        Experts of each unit: one, or a group that stays together.
    width_U, bytes_U : ndarray
        Slots and weight bytes that a replica of the unit takes.
    tokens_CU : ndarray
        Tokens per step of each case, regime scale included.
    case_weight_C, scenario_C : ndarray
        Weight of each case (they sum to 1), and the scenario it belongs to.
    read_UD : ndarray
        Seconds in which a device reads the unit's weights.
    token_s_D : ndarray
        Seconds per token.
    base_CD : ndarray
        Seconds that a device spends whatever the placement: shared experts.
    slots_D, budget_D : ndarray
        Slots and bytes for this layer.
    allowed_UD, pinned_UD, held_UD : ndarray of bool
    node_D : ndarray
    min_nodes : int
    moved_byte_s : float
    """

    layer: int
    members: tuple[tuple[int, ...], ...]
    width_U: IntArray
    bytes_U: FloatArray
    tokens_CU: FloatArray
    case_weight_C: FloatArray
    scenario_C: IntArray
    read_UD: FloatArray
    token_s_D: FloatArray
    base_CD: FloatArray
    slots_D: IntArray
    budget_D: FloatArray
    allowed_UD: BoolArray
    pinned_UD: BoolArray
    held_UD: BoolArray
    node_D: IntArray
    min_nodes: int
    moved_byte_s: float

    @property
    def units(self) -> int:
        return len(self.members)

    @property
    def devices(self) -> int:
        return len(self.token_s_D)

    def heavy(self, time_s: float) -> bool:
        """Whether reading one replica takes a good part of ``time_s`` seconds."""
        return float(self.read_UD.min()) > HEAVY * time_s

    def scaled(self, factor: float) -> LayerProblem:
        """The same layer with every second multiplied: solvers have absolute tolerances."""
        return replace(
            self,
            read_UD=self.read_UD * factor,
            token_s_D=self.token_s_D * factor,
            base_CD=self.base_CD * factor,
            moved_byte_s=self.moved_byte_s * factor,
        )

    @cached_property
    def tokens_U(self) -> FloatArray:
        """Tokens averaged over cases: with equal shares, eq. 4 is linear in them."""
        mean: FloatArray = self.case_weight_C @ self.tokens_CU
        return mean

    @cached_property
    def base_D(self) -> FloatArray:
        mean: FloatArray = self.case_weight_C @ self.base_CD
        return mean

    @cached_property
    def node_count(self) -> int:
        return int(self.node_D.max()) + 1

    @cached_property
    def plain(self) -> bool:
        """True if a replica is like any other: one slot, equal bytes, no rule beyond slots and memory."""
        return bool(
            (self.width_U == 1).all()
            and (self.bytes_U == self.bytes_U[0]).all()
            and self.allowed_UD.all()
            and not self.pinned_UD.any()
            and self.min_nodes == 1
        )


def unit_members(problem: PlacementProblem) -> tuple[tuple[int, ...], ...]:
    """Groups, and each remaining expert alone, ordered by first expert."""
    grouped = {e for group in problem.options.groups for e in group}
    alone = [(e,) for e in range(problem.experts) if e not in grouped]
    groups = [tuple(sorted(g)) for g in problem.options.groups if g]
    return tuple(sorted([*groups, *alone]))


def cases(problem: PlacementProblem) -> tuple[FloatArray, IntArray, FloatArray]:
    """Weight, scenario and token scale of every case: scenarios outside, regimes inside."""
    regimes = problem.objective.regimes
    weight_R = np.array([r.weight for r in regimes], dtype=np.float64)
    scale_R = np.array([r.token_scale for r in regimes], dtype=np.float64)
    weight_S = problem.loads.scenario_weights_S
    weight_C = np.outer(weight_S, weight_R / weight_R.sum()).ravel()
    scenario_C = np.repeat(np.arange(len(weight_S)), len(regimes)).astype(np.int64)
    return weight_C, scenario_C, np.tile(scale_R, len(weight_S))


def base_time_CD(problem: PlacementProblem, tokens_CE: FloatArray) -> FloatArray:
    """Shared experts (eq. 4): every device reads them and runs them for its even part of the step's tokens."""
    model, cluster = problem.model, problem.cluster
    local_C = tokens_CE.sum(axis=1) / model.top_k / problem.devices
    read_D = model.shared_bytes / cluster.bandwidth_bytes_s_D
    return read_D + np.outer(local_C, model.shared_flops_per_token / cluster.flops_D)


def layer_problem(problem: PlacementProblem, layer: int) -> LayerProblem:
    """The arrays of one layer."""
    members = unit_members(problem)
    weight_C, scenario_C, scale_C = cases(problem)
    tokens_CE = problem.loads.tokens_SLE[scenario_C, layer] * scale_C[:, None]
    first_U = np.array([m[0] for m in members])
    bytes_U = np.array([problem.model.bytes_LE[layer, list(m)].sum() for m in members])

    def any_member(mask_ED: BoolArray) -> BoolArray:
        mask_UD: BoolArray = mask_ED[first_U]
        if len(members) < problem.experts:
            mask_UD = np.stack([mask_ED[list(m)].any(axis=0) for m in members])
        return mask_UD

    return LayerProblem(
        layer=layer,
        members=members,
        width_U=np.array([len(m) for m in members], dtype=np.int64),
        bytes_U=bytes_U,
        tokens_CU=np.stack([tokens_CE[:, list(m)].sum(axis=1) for m in members], axis=1),
        case_weight_C=weight_C,
        scenario_C=scenario_C,
        read_UD=bytes_U[:, None] / problem.cluster.bandwidth_bytes_s_D,
        token_s_D=problem.model.flops_per_token / problem.cluster.flops_D,
        base_CD=base_time_CD(problem, tokens_CE),
        slots_D=problem.slots_LD[layer],
        budget_D=problem.budget_bytes_LD[layer] * (1 + 1e-12),
        allowed_UD=~any_member(problem.forbidden_LED[layer]),
        pinned_UD=any_member(problem.pinned_LED[layer]),
        held_UD=any_member(problem.held_LED[layer]),
        node_D=problem.cluster.node_D,
        min_nodes=int(problem.options.min_nodes),
        moved_byte_s=problem.prices.moved_byte_s,
    )


def layer_problems(problem: PlacementProblem) -> list[LayerProblem]:
    return [layer_problem(problem, layer) for layer in range(problem.layers)]
