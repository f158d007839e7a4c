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
from concertina.planners.sampled import solve_sampled
from concertina.planners.solution import Solution, StoppingRule
from concertina.planners.solve import solve
from concertina.planners.split import SplitTable, split

WINDOWS = 8
DRIFT = (0.1, 0.9)
"""Part of the later domains in the first and last window of a made-up trace."""
METHODS = ("eplb_global", "greedy", "scalable", "robust", "oracle")


def leave_one_out(
    domains: Mapping[str, FloatArray], devices: int, spare: int, stop: StoppingRule
) -> list[dict[str, Any]]:
    """One row per held-out domain and method: balancedness (mean / maximum device load), mean and worst layer.

    ``fixed``: the plan's own shares (EPLB's are equal). ``split``: the batch's tokens split afresh. ``robust`` knows
    the other domains as scenarios, samples around them, and that workers will split; ``oracle`` knows the held-out
    domain itself, which shows what the slots allow; the rest know the others' sum.
    """
    rows = []
    for held, batch_LE in domains.items():
        others = np.stack([_scaled(table) for name, table in domains.items() if name != held])
        scored = _scaled(batch_LE)[None]
        for method in METHODS:
            placement = _planned(scored if method == "oracle" else others, method, devices, spare, stop)
            row = {"part": "honesty", "devices": devices, "spare": spare, "held_out": held, "method": method}
            rows.append(row | _scores(placement, scored, devices))
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
        placement = _planned(second if method == "oracle" else first, method, devices, spare, stop)
        row = {"part": "halves", "devices": devices, "spare": spare, "held_out": "second half", "method": method}
        rows.append(row | _scores(placement, second, devices))
    return rows


def gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours with the per-batch split above EPLB's equal split: for either part and number of devices, three readings.

    ``mean`` of all domains and layers; ``worst layer``: our worst against EPLB's worst, wherever they are; ``least of
    one layer``: the layer that gains least. ``room`` is what was left to 1, ``taken`` the part of it that was gained,
    ``attainable`` the gain of a plan that knows what is held out.
    """
    found = []
    for part, devices in sorted({(r["part"], r["devices"]) for r in rows}):
        here = [r for r in rows if (r["part"], r["devices"]) == (part, devices)]
        eplb, ours, oracle = (
            np.array([r[scored] for r in here if r["method"] == method])
            for method, scored in (("eplb_global", "fixed_WL"), ("robust", "split_WL"), ("oracle", "split_WL"))
        )
        least = np.unravel_index((ours - eplb).argmin(), eplb.shape)
        for of, e, o, best in (
            ("mean", eplb.mean(), ours.mean(), oracle.mean()),
            ("worst layer", eplb.min(), ours.min(), oracle.min()),
            ("least of one layer", eplb[least], ours[least], oracle[least]),
        ):
            row = {"part": part, "devices": devices, "of": of, "eplb": float(e), "ours": float(o), "gain": float(o - e)}
            row |= {"room": float(1.0 - e), "taken": float((o - e) / (1.0 - e)), "attainable": float(best - e)}
            found.append(row)
    return found


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


def _scaled(counts_LE: FloatArray) -> FloatArray:
    """Whole tokens, about 1,000 per expert, so that domains weigh the same."""
    scaled: FloatArray = np.rint(counts_LE / counts_LE.mean(axis=1, keepdims=True) * 1000)
    return scaled


def _planned(tokens_SLE: FloatArray, method: str, devices: int, spare: int, stop: StoppingRule) -> Placement:
    several = method in ("robust", "oracle")
    _, layers, experts = tokens_SLE.shape
    fleet = Cluster(tuple(Device(f"d{i}", "equal", 10**13, 1e12, 1e30) for i in range(devices)))
    problem = PlacementProblem(
        fleet,
        ModelSpec(layers, experts, 1.0, 1e6),
        Loads(tokens_SLE) if several else Loads(tokens_SLE.mean(axis=0)),
        slots=-(-(experts + spare) // devices),
        objective=Objective(split="per_batch" if several else "fixed"),
    )
    if method == "robust":
        answer = solve_sampled(problem, stop=stop)
    else:
        answer = solve(problem, "scalable" if method == "oracle" else method, stop=stop)
    assert isinstance(answer, Solution)
    return answer.placement


def _scores(placement: Placement, batch_WLE: FloatArray, devices: int) -> dict[str, Any]:
    """Mean and worst layer of all batches, every layer's figures, and what experts without a second replica leave."""
    fixed_WL, split_WL, single_WL = (np.ones(batch_WLE.shape[:2]) for _ in range(3))
    for w, batch_LE in enumerate(batch_WLE.astype(np.int64)):
        for layer, tokens_E in enumerate(batch_LE):
            table = SplitTable(placement.replicas_LE[layer], np.ones(devices))
            for scores, tokens_R in ((fixed_WL, table.by_share(tokens_E)), (split_WL, split(table, tokens_E))):
                load_D = table.time_D(tokens_R)
                scores[w, layer] = load_D.mean() / load_D.max()
            single_E = np.bincount(table.expert_R, minlength=len(tokens_E)) == 1
            single_WL[w, layer] = min(1.0, tokens_E.sum() / devices / max(tokens_E[single_E].max(initial=0), 1))
    return {
        "fixed_mean": float(fixed_WL.mean()),
        "fixed_worst": float(fixed_WL.min()),
        "split_mean": float(split_WL.mean()),
        "split_worst": float(split_WL.min()),
        "single_worst": float(single_WL.min()),
        "fixed_WL": np.round(fixed_WL, 4).tolist(),
        "split_WL": np.round(split_WL, 4).tolist(),
    }
