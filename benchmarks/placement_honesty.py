"""Held-out honesty: plan on some domains, score on another, with and without the per-batch split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from concertina.planners.cluster import Cluster, Device
from concertina.planners.fields import FloatArray
from concertina.planners.model import Loads, ModelSpec
from concertina.planners.placement import Placement
from concertina.planners.problem import Objective, PlacementProblem
from concertina.planners.scenarios import with_samples
from concertina.planners.solution import Solution, StoppingRule
from concertina.planners.solve import solve
from concertina.planners.split import SplitTable, split

METHODS = ("eplb_global", "greedy", "scalable", "robust")


def leave_one_out(
    domains: Mapping[str, FloatArray], devices: int, spare: int, stop: StoppingRule
) -> list[dict[str, Any]]:
    """One row per held-out domain and method: balancedness (mean / maximum device load), mean and worst layer.

    ``fixed``: the plan's own shares (EPLB's are equal). ``split``: the batch's tokens split afresh. ``robust`` knows
    the other domains as scenarios, samples around them, and that workers will split; the rest know their sum.
    """
    rows = []
    for held, batch_LE in domains.items():
        others = [_scaled(table) for name, table in domains.items() if name != held]
        for method in METHODS:
            placement = _planned(np.stack(others), method, devices, spare, stop)
            fixed_L, split_L = _scores(placement, _scaled(batch_LE), devices)
            rows.append(
                {
                    "part": "honesty",
                    "devices": devices,
                    "spare": spare,
                    "held_out": held,
                    "method": method,
                    "fixed_mean": float(fixed_L.mean()),
                    "fixed_worst": float(fixed_L.min()),
                    "split_mean": float(split_L.mean()),
                    "split_worst": float(split_L.min()),
                }
            )
    return rows


def _scaled(counts_LE: FloatArray) -> FloatArray:
    """Whole tokens, about 1,000 per expert, so that domains weigh the same."""
    scaled: FloatArray = np.rint(counts_LE / counts_LE.mean(axis=1, keepdims=True) * 1000)
    return scaled


def _planned(tokens_SLE: FloatArray, method: str, devices: int, spare: int, stop: StoppingRule) -> Placement:
    robust = method == "robust"
    _, layers, experts = tokens_SLE.shape
    fleet = Cluster(tuple(Device(f"d{i}", "equal", 10**13, 1e12, 1e30) for i in range(devices)))
    loads = with_samples(Loads(tokens_SLE)) if robust else Loads(tokens_SLE.mean(axis=0))
    problem = PlacementProblem(
        fleet,
        ModelSpec(layers, experts, 1.0, 1e6),
        loads,
        slots=-(-(experts + spare) // devices),
        objective=Objective(split="per_batch" if robust else "fixed"),
    )
    answer = solve(problem, "scalable" if robust else method, stop=stop)
    assert isinstance(answer, Solution)
    return answer.placement


def _scores(placement: Placement, batch_LE: FloatArray, devices: int) -> tuple[FloatArray, FloatArray]:
    fixed: list[float] = []
    free: list[float] = []
    for layer, tokens_E in enumerate(batch_LE.astype(np.int64)):
        table = SplitTable(placement.replicas_LE[layer], np.ones(devices))
        for scores, tokens_R in ((fixed, table.by_share(tokens_E)), (free, split(table, tokens_E))):
            load_D = table.time_D(tokens_R)
            scores.append(float(load_D.mean() / load_D.max()))
    return np.array(fixed), np.array(free)
