"""The per-batch split on the step path: CPU time, and distance from the linear program."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
from concertina.planners.baselines import eplb_global
from concertina.planners.construct import Greed, longest_first
from concertina.planners.fields import FloatArray
from concertina.planners.model import Loads
from concertina.planners.placement import Replica
from concertina.planners.split import SplitTable, split
from concertina.planners.split_reference import best_split_lp
from concertina.planners.units import layer_problem

from .placement_cases import Case, cluster, problem

EXPERTS, DEVICES = 256, 64
TOKENS = 512.0
"""Mean tokens of an expert in a batch."""
DRIFTS = (0.3, 0.6)
"""Standard deviation of the logarithm of a batch's loads against those planned for."""
REPEATS = 5
BATCHES = 8


def split_rows(quick: bool) -> list[dict[str, Any]]:
    """Rows for hot experts replicated in 64 spare slots, and for every expert held twice; equal and mixed devices."""
    rows = []
    for name in ("64 spare", "all twice", "all twice at random"):
        for mixed in (False, True):
            rng = np.random.default_rng(0)
            load_E = rng.lognormal(0.0, 0.8, EXPERTS) * TOKENS
            rates = 1.0 / cluster(DEVICES, mixed).flops_D
            if name == "64 spare":
                replicas = _spare(load_E)
            else:
                replicas = _twice(load_E, mixed) if name == "all twice" else _at_random(rng)
            table = SplitTable(replicas, rates / rates.min())
            for drift in DRIFTS:
                batches = [rng.poisson(load_E * np.exp(rng.normal(0, drift, EXPERTS))) for _ in range(BATCHES)]
                row = {"part": "split", "replicas": name, "mixed": mixed, "drift": drift}
                rows.append({**row, **_measured(table, batches[: 2 if quick else BATCHES])})
    return rows


def _measured(table: SplitTable, batches: list[Any]) -> dict[str, float]:
    """Least CPU time of a few repeats, in ms, and the excess over the linear program; mean and most over batches."""
    times, above = [], []
    for tokens_E in batches:
        spent = []
        for _ in range(REPEATS):
            began_s = time.process_time()
            tokens_R = split(table, tokens_E)
            spent.append(time.process_time() - began_s)
        times.append(1e3 * min(spent))
        above.append(float(table.time_D(tokens_R).max()) / best_split_lp(table, tokens_E)[0] - 1.0)
    ms = {"ms_mean": float(np.mean(times)), "ms_most": max(times)}
    return ms | {"above_lp_mean": float(np.mean(above)), "above_lp_most": max(above)}


def _spare(load_E: FloatArray) -> list[list[Replica]]:
    """EPLB's plan with 64 spare slots, in equal shares."""
    plan = eplb_global(load_E, DEVICES, (EXPERTS + 64) // DEVICES)
    on = [[d for d, counts in enumerate(plan) if e in counts] for e in range(EXPERTS)]
    return [[Replica(d, 0, 1.0 / len(devices)) for d in devices] for devices in on]


def _twice(load_E: FloatArray, mixed: bool) -> list[list[Replica]]:
    """Every expert on two devices, placed longest first."""
    case = Case(EXPERTS, 1, DEVICES, EXPERTS, mixed)
    instance = replace(problem(case), loads=Loads(load_E[None]))
    layout = longest_first(layer_problem(instance, 0), np.full(EXPERTS, 2), Greed())
    assert layout is not None
    on: list[list[Replica]] = [[] for _ in range(EXPERTS)]
    for e, d in zip(layout.unit_R.tolist(), layout.device_R.tolist(), strict=True):
        on[e].append(Replica(d, 0, 0.5))
    return on


def _at_random(rng: np.random.Generator) -> list[list[Replica]]:
    """Every expert on two devices, eight replicas on each device: random rounds through all devices, loads unseen."""
    rounds = [rng.permutation(DEVICES).tolist() for _ in range(EXPERTS // DEVICES)]
    pairs = [(a, b) for order in rounds for a, b in zip(order, order[1:] + order[:1], strict=True)]
    return [[Replica(a, 0, 0.5), Replica(b, 0, 0.5)] for a, b in pairs]
