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

WINDOWS = 8
DRIFT = (0.1, 0.9)
"""Part of the later domains in the first and last window of a made-up trace."""
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
        others = np.stack([_scaled(table) for name, table in domains.items() if name != held])
        for method in METHODS:
            placement = _planned(others, method, devices, spare, stop)
            fixed_L, split_L = _scores(placement, _scaled(batch_LE), devices)
            row = {"part": "honesty", "devices": devices, "spare": spare, "held_out": held, "method": method}
            rows.append(row | _summary(fixed_L[None], split_L[None]))
    return rows


def halves(domains: Mapping[str, FloatArray], devices: int, spare: int, stop: StoppingRule) -> list[dict[str, Any]]:
    """One row per method: planned on the first half of a trace's windows, scored on the second half.

    The routing data has no order, so the trace is made up: its text drifts from the first half of the domains to the
    others, and each window's tokens are drawn from the domains' real counts.
    """
    windows = _drifting(list(domains.values()))
    first, second = windows[: WINDOWS // 2], windows[WINDOWS // 2 :]
    rows = []
    for method in METHODS:
        placement = _planned(first, method, devices, spare, stop)
        scores = [_scores(placement, batch_LE, devices) for batch_LE in second]
        row = {"part": "halves", "devices": devices, "spare": spare, "held_out": "second half", "method": method}
        rows.append(row | _summary(np.stack([f for f, _ in scores]), np.stack([s for _, s in scores])))
    return rows


def _drifting(tables: list[FloatArray], seed: int = 0) -> FloatArray:
    """Windows of a made-up trace, shape (WINDOWS, L, E), about 1,000 tokens per expert each."""
    rng = np.random.default_rng(seed)
    chance_KLE = np.stack([table / table.sum(axis=1, keepdims=True) for table in tables])
    late_K = np.arange(len(tables)) >= len(tables) // 2
    windows = []
    for late in np.linspace(*DRIFT, WINDOWS):
        weight_K = np.where(late_K, late / late_K.sum(), (1.0 - late) / (~late_K).sum())
        mixed_LE = np.tensordot(weight_K, chance_KLE, axes=1)
        total = 1000 * mixed_LE.shape[1]
        windows.append(np.stack([rng.multinomial(total, p / p.sum()) for p in mixed_LE]).astype(np.float64))
    return np.stack(windows)


def _summary(fixed_WL: FloatArray, split_WL: FloatArray) -> dict[str, float]:
    """Mean, and worst layer of any window."""
    return {
        "fixed_mean": float(fixed_WL.mean()),
        "fixed_worst": float(fixed_WL.min()),
        "split_mean": float(split_WL.mean()),
        "split_worst": float(split_WL.min()),
    }


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
