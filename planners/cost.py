"""What a placement costs, by term (equations of ``planners/README.md``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .comm import flow_pairs, home_seconds_per_token_D, hop_tokens
from .fields import BoolArray, FloatArray, IntArray, fail
from .flow import Flow
from .placement import Placement
from .problem import PlacementProblem
from .risk import risk
from .units import base_time_CD, cases


@dataclass(frozen=True, eq=False)
class Cost:
    """Seconds by term; every term is already weighted over regimes and scenarios.

    Parameters
    ----------
    step_L : ndarray, shape (L,)
        Per layer, the slowest device's time (eq. 4, 7, 8).
    node_L, cluster_L : ndarray, shape (L,)
        Communication within and between nodes (eq. 5).
    moves : float
        Price of replicas that are not in the current placement (eq. 9).
    device_LD : ndarray, shape (L, D)
        Expected time of every device: weights read plus token work.
    read_LD : ndarray, shape (L, D)
        The part of ``device_LD`` that reads weights.
    """

    step_L: FloatArray
    node_L: FloatArray
    cluster_L: FloatArray
    moves: float
    device_LD: FloatArray
    read_LD: FloatArray

    @property
    def total(self) -> float:
        return float(self.step_L.sum() + self.node_L.sum() + self.cluster_L.sum() + self.moves)

    def to_dict(self) -> dict[str, Any]:
        """Totals by term, JSON-ready."""
        return {
            "total_s": self.total,
            "step_s": float(self.step_L.sum()),
            "node_s": float(self.node_L.sum()),
            "cluster_s": float(self.cluster_L.sum()),
            "moves_s": self.moves,
        }


@dataclass(frozen=True, eq=False)
class Replicas:
    """One layer's replicas: unit (expert or group), device and share of each."""

    unit_R: IntArray
    device_R: IntArray
    share_R: FloatArray


def _layers(problem: PlacementProblem, placement: Placement) -> list[Replicas]:
    if (placement.layers, placement.experts) != (problem.layers, problem.experts):
        got = f"{placement.layers} layers of {placement.experts} experts"
        fail("placement", got, f"{problem.layers} layers of {problem.experts}")
    unknown = [name for name in placement.devices if name not in problem.cluster.index]
    if unknown:
        fail("placement: devices", unknown, "devices of the cluster")
    here = np.array([problem.cluster.index[name] for name in placement.devices], dtype=np.int64)
    layers = []
    for experts in placement.replicas_LE:
        flat = [(e, r.device, r.share) for e, replicas in enumerate(experts) for r in replicas]
        expert, device, share = zip(*flat, strict=True)
        layers.append(Replicas(np.array(expert), here[list(device)], np.array(share, dtype=np.float64)))
    return layers


def evaluate(problem: PlacementProblem, placement: Placement) -> Cost:
    """The cost of any placement of the problem's experts on its devices, whether or not it keeps the rules.

    Raises
    ------
    OperatorError
        The placement has other layers or experts, or devices that the cluster lacks.
    """
    layers = _layers(problem, placement)
    step_L = np.zeros(problem.layers)
    device_LD = np.zeros((problem.layers, problem.devices))
    read_LD = np.zeros_like(device_LD)
    for i, layer in enumerate(layers):
        step_L[i], device_LD[i], read_LD[i] = _step(problem, i, layer)
    node_L, cluster_L = _comm(problem, layers)
    return Cost(step_L, node_L, cluster_L, _moves(problem, layers), device_LD, read_LD)


def _step(problem: PlacementProblem, index: int, layer: Replicas) -> tuple[float, FloatArray, FloatArray]:
    """Eq. 4, 6 to 8 of one layer: its cost, and expected time and read time of every device."""
    weight_C, scenario_C, scale_C = cases(problem)
    tokens_CE = problem.loads.tokens_SLE[scenario_C, index] * scale_C[:, None]
    bytes_D = np.bincount(
        layer.device_R, weights=problem.model.bytes_LE[index, layer.unit_R], minlength=problem.devices
    )
    base_CD = base_time_CD(problem, tokens_CE)
    read_D = bytes_D / problem.cluster.bandwidth_bytes_s_D
    rate_D = problem.model.flops_per_token / problem.cluster.flops_D
    per_batch = problem.objective.split == "per_batch"
    time_CD = case_times_CD(layer, tokens_CE, rate_D, base_CD + read_D, per_batch)
    step = risk(scenario_C, weight_C, time_CD.max(axis=1), problem.objective.tail)
    return step, weight_C @ time_CD, read_D


def case_times_CD(
    replicas: Replicas, tokens_CU: FloatArray, rate_D: FloatArray, fixed_CD: FloatArray, per_batch: bool
) -> FloatArray:
    """Eq. 4: time of every device in every case, under the replicas' shares or, per batch, the best ones (eq. 6)."""
    if per_batch:
        pairs = zip(tokens_CU, fixed_CD, strict=True)
        return np.stack([best_split(replicas, tokens_U, rate_D, fixed_D) for tokens_U, fixed_D in pairs])
    tokens_CR = tokens_CU[:, replicas.unit_R] * replicas.share_R
    work_CD = [np.bincount(replicas.device_R, weights=t, minlength=len(rate_D)) for t in tokens_CR]
    time_CD: FloatArray = fixed_CD + np.stack(work_CD) * rate_D
    return time_CD


def best_split(replicas: Replicas, tokens_U: FloatArray, rate_D: FloatArray, fixed_D: FloatArray) -> FloatArray:
    """Device times under the best shares for these tokens (eq. 6)."""
    unit, device = replicas.unit_R.tolist(), replicas.device_R.tolist()
    flow = Flow(tokens_U.tolist(), unit, device, rate_D.tolist(), fixed_D.tolist())
    flow.settle(range(len(rate_D)), 1e-9 * max(flow.time), most=400 * len(tokens_U))
    return np.array(flow.time)


def _comm(problem: PlacementProblem, layers: list[Replicas]) -> tuple[FloatArray, FloatArray]:
    weight_C, scenario_C, scale_C = cases(problem)
    tokens_LE = np.tensordot(weight_C * scale_C, problem.loads.tokens_SLE[scenario_C], axes=1)
    node_D, cluster_D = home_seconds_per_token_D(problem)
    node_L, cluster_L = np.zeros(problem.layers), np.zeros(problem.layers)
    for i, layer in enumerate(layers):
        tokens_R = tokens_LE[i][layer.unit_R] * layer.share_R
        if i == 0 or problem.loads.pairs_PEE is None:
            node_L[i] = float(tokens_R @ node_D[layer.device_R])
            cluster_L[i] = float(tokens_R @ cluster_D[layer.device_R])
        else:
            pairs_EE = flow_pairs(problem, i, tokens_LE[i])
            near, far = hop_tokens(pairs_EE, _dense(problem, layers[i - 1]), _dense(problem, layer), problem.cluster)
            bytes_each = problem.model.hidden_bytes / problem.devices
            node_L[i] = near * bytes_each / problem.cluster.links.node_bytes_s
            cluster_L[i] = far * bytes_each / problem.cluster.links.cluster_bytes_s
    return node_L, cluster_L


def _dense(problem: PlacementProblem, layer: Replicas) -> FloatArray:
    share_ED = np.zeros((problem.experts, problem.devices))
    share_ED[layer.unit_R, layer.device_R] = layer.share_R
    return share_ED


def _moves(problem: PlacementProblem, layers: list[Replicas]) -> float:
    """Eq. 9; nothing where there is no current placement."""
    if problem.current is None or problem.prices.moved_byte_s == 0:
        return 0.0
    moved = 0.0
    for i, layer in enumerate(layers):
        new_R: BoolArray = ~problem.held_LED[i, layer.unit_R, layer.device_R]
        moved += float(problem.model.bytes_LE[i, layer.unit_R[new_R]].sum())
    return moved * problem.prices.moved_byte_s
