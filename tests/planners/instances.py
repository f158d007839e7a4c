"""Small problems for the planners' tests, and a brute-force oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from concertina.planners.cluster import Cluster, Device, Links
from concertina.planners.cost import evaluate
from concertina.planners.model import Loads, ModelSpec
from concertina.planners.placement import Placement, Replica
from concertina.planners.problem import Objective, Options, PlacementProblem, Prices


def cluster(speeds: list[float], nodes: int = 1, memory_bytes: int = 10**9, flops: float = 1.0) -> Cluster:
    """Devices ``d0``... whose bandwidth and compute rate are ``speeds``, dealt round nodes."""
    devices = tuple(Device(f"d{i}", "test", memory_bytes, flops * s, s, f"n{i % nodes}") for i, s in enumerate(speeds))
    return Cluster(devices, Links(4.0, 1.0))


def problem(
    tokens: np.ndarray,
    speeds: list[float],
    slots: object,
    expert_bytes: object = 1.0,
    nodes: int = 1,
    objective: Objective | None = None,
    options: Options | None = None,
    current: Placement | None = None,
    price: float = 0.0,
    pairs: np.ndarray | None = None,
    hidden_bytes: float = 0.0,
    weights: object = None,
) -> PlacementProblem:
    layers, experts = np.asarray(tokens).shape[-2:]
    return PlacementProblem(
        cluster(speeds, nodes),
        ModelSpec(layers, experts, expert_bytes, 1.0, hidden_bytes=hidden_bytes),
        Loads(tokens, weights, pairs),
        slots=np.asarray(slots) if slots is not None else None,
        objective=objective or Objective(),
        options=options or Options(),
        current=current,
        prices=Prices(price),
    )


def one_layer_choices(p: PlacementProblem, layer: int) -> Iterator[list[tuple[int, ...]]]:
    """Every assignment of device sets to experts that keeps the slots."""
    sets = [c for n in range(1, p.devices + 1) for c in itertools.combinations(range(p.devices), n)]
    for choice in itertools.product(sets, repeat=p.experts):
        used = np.bincount([d for c in choice for d in c], minlength=p.devices)
        if (used <= p.slots_LD[layer]).all():
            yield list(choice)


def best_by_force(p: PlacementProblem) -> float:
    """The least cost of a one-layer, one-case problem, with the best shares for every choice of device sets."""
    from concertina.planners.milp import pulp

    best = np.inf
    for choice in one_layer_choices(p, 0):
        model = pulp.LpProblem("force", pulp.LpMinimize)
        top = pulp.LpVariable("top")
        model += top
        work: list[list[object]] = [[] for _ in range(p.devices)]
        for e, devices in enumerate(choice):
            part = [pulp.LpVariable(f"s{e}_{d}", 0, 1) for d in devices]
            model += pulp.lpSum(part) == 1
            for d, v in zip(devices, part, strict=True):
                device = p.cluster.devices[d]
                work[d].append(float(p.model.bytes_LE[0, e]) / device.bandwidth_bytes_s)
                work[d].append(float(p.loads.tokens_SLE[0, 0, e]) * p.model.flops_per_token / device.flops * v)
        for terms in work:
            model += top >= pulp.lpSum(terms)
        model.solve(pulp.HiGHS(msg=False))
        best = min(best, float(pulp.value(model.objective)))
    return best


def relabelled(p: Placement, order: list[int]) -> Placement:
    """The same placement with experts renamed: new expert i is old expert ``order[i]``."""
    return Placement(p.devices, tuple(tuple(experts[e] for e in order) for experts in p.replicas_LE))


def single(devices: tuple[str, ...], owner_LE: list[list[int]]) -> Placement:
    """One replica each, on the given devices."""
    layers = []
    for owners in owner_LE:
        used = [0] * len(devices)
        row = []
        for d in owners:
            row.append((Replica(d, used[d]),))
            used[d] += 1
        layers.append(tuple(row))
    return Placement(devices, tuple(layers))


def total(p: PlacementProblem, placement: Placement) -> float:
    return evaluate(p, placement).total
