"""What others do, for comparison only; none looks at speed, memory, rules or the current placement.

EPLB is re-implemented from the description of DeepSeek's Expert Parallelism Load Balancer: replicas go one by one to
the expert with most tokens per replica; packing gives each item, heaviest first, to the lightest pack with room. The
hierarchical policy packs expert groups to nodes first, then replicates and packs within each node.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bounds import problem_bound, step_bound
from .cost import evaluate
from .fields import FloatArray, IntArray
from .placement import Placement, Replica
from .problem import PlacementProblem
from .solution import Infeasible, Lack, Solution
from .units import layer_problems

Counts = dict[int, int]
"""Copies of each expert on one device."""


def packed(weight_I: FloatArray, packs: int) -> IntArray:
    """Pack of every item: heaviest first, to the lightest pack that has fewer than items/packs of them."""
    room = len(weight_I) // packs
    load, held = np.zeros(packs), np.zeros(packs, dtype=np.int64)
    pack_I = np.zeros(len(weight_I), dtype=np.int64)
    for i in np.argsort(-weight_I, kind="stable"):
        pack = int(np.where(held < room, load, np.inf).argmin())
        pack_I[i] = pack
        load[pack] += weight_I[i]
        held[pack] += 1
    return pack_I


def replicated(tokens_E: FloatArray, slots: int) -> IntArray:
    """Expert of every one of ``slots`` physical experts."""
    count_E = np.ones(len(tokens_E), dtype=np.int64)
    for _ in range(slots - len(tokens_E)):
        count_E[int((tokens_E / count_E).argmax())] += 1
    return np.repeat(np.arange(len(tokens_E)), count_E)


def eplb_global(tokens_E: FloatArray, devices: int, slots_each: int) -> list[Counts]:
    """Replicate over the whole cluster, then pack to devices."""
    expert_R = replicated(tokens_E, devices * slots_each)
    each_R = (tokens_E / np.bincount(expert_R))[expert_R]
    plan: list[Counts] = [{} for _ in range(devices)]
    for e, d in zip(expert_R.tolist(), packed(each_R, devices).tolist(), strict=True):
        plan[d][e] = plan[d].get(e, 0) + 1
    return plan


def eplb_hierarchical(
    tokens_E: FloatArray, groups: list[list[int]], nodes: list[list[int]], slots: int
) -> list[Counts]:
    """Pack groups to nodes, then replicate and pack within every node (whose devices are given by index)."""
    plan: list[Counts] = [{} for node in nodes for _ in node]
    node_G = packed(np.array([tokens_E[g].sum() for g in groups]), len(nodes))
    for n, devices in enumerate(nodes):
        experts = [e for g, group in enumerate(groups) if node_G[g] == n for e in group]
        for d, counts in zip(devices, eplb_global(tokens_E[experts], len(devices), slots), strict=True):
            plan[d] = {experts[i]: c for i, c in counts.items()}
    return plan


def _round_robin(problem: PlacementProblem, layer: int) -> list[Counts]:
    plan: list[Counts] = [{} for _ in range(problem.devices)]
    d = -1
    for e in range(problem.experts):
        d = next(k % problem.devices for k in range(d + 1, d + 1 + problem.devices) if _room(problem, layer, plan, k))
        plan[d][e] = 1
    return plan


def _room(problem: PlacementProblem, layer: int, plan: list[Counts], k: int) -> bool:
    return len(plan[k % problem.devices]) < int(problem.slots_LD[layer, k % problem.devices])


def _greedy(problem: PlacementProblem, layer: int) -> list[Counts]:
    tokens_E, load_D = problem.loads.mean_LE[layer], np.zeros(problem.devices)
    plan: list[Counts] = [{} for _ in range(problem.devices)]
    for e in np.argsort(-tokens_E, kind="stable").tolist():
        full_D = np.array([len(p) for p in plan]) >= problem.slots_LD[layer]
        d = int(np.where(full_D, np.inf, load_D).argmin())
        plan[d][e] = 1
        load_D[d] += tokens_E[e]
    return plan


def _eplb_global(problem: PlacementProblem, layer: int) -> list[Counts]:
    each = int(problem.slots_LD[layer].min())
    return eplb_global(problem.loads.mean_LE[layer], problem.devices, each)


def _eplb_hierarchical(problem: PlacementProblem, layer: int) -> list[Counts]:
    """Falls back to the global policy where groups or devices do not divide evenly over nodes, as EPLB does."""
    cluster = problem.cluster
    nodes = [np.flatnonzero(cluster.node_D == n).tolist() for n in range(len(cluster.nodes))]
    groups = [list(g) for g in problem.options.groups] or [[e] for e in range(problem.experts)]
    sizes = {len(g) for g in groups}
    even = len({len(n) for n in nodes}) == 1 and len(groups) % len(nodes) == 0 and len(sizes) == 1
    if not even or sum(map(len, groups)) != problem.experts:
        return _eplb_global(problem, layer)
    return eplb_hierarchical(problem.loads.mean_LE[layer], groups, nodes, int(problem.slots_LD[layer].min()))


def _placement(problem: PlacementProblem, plans: list[list[Counts]]) -> Placement:
    """Two copies on one device become one replica with both shares."""
    layers = []
    for plan in plans:
        copies_E = np.zeros(problem.experts)
        for counts in plan:
            for e, c in counts.items():
                copies_E[e] += c
        replicas: list[list[Replica]] = [[] for _ in range(problem.experts)]
        for d, counts in enumerate(plan):
            for slot, e in enumerate(sorted(counts)):
                replicas[e].append(Replica(d, slot, float(counts[e] / copies_E[e])))
        layers.append(tuple(tuple(r) for r in replicas))
    return Placement(problem.cluster.names, tuple(layers))


def _baseline(
    name: str, rule: Callable[[PlacementProblem, int], list[Counts]], equal_slots: bool
) -> Callable[[PlacementProblem], Solution | Infeasible]:
    def run(problem: PlacementProblem) -> Solution | Infeasible:
        for layer, slots_D in enumerate(problem.slots_LD):
            have = int(slots_D.min()) * problem.devices if equal_slots else int(slots_D.sum())
            if have < problem.experts:
                what = f"layer {layer}: {name}" + (
                    ", which uses equally many slots on every device" if equal_slots else ""
                )
                return Infeasible((Lack(what, problem.experts, have, "slots"),), proven=False)
        placement = _placement(problem, [rule(problem, layer) for layer in range(problem.layers)])
        layers = layer_problems(problem)
        tail, per_batch = problem.objective.tail, problem.objective.split == "per_batch"
        bound_L = np.array([step_bound(layer, tail, per_batch) for layer in layers])
        bound = problem_bound(problem, layers, bound_L)
        return Solution(placement, evaluate(problem, placement), bound, "baseline", name)

    return run


BASELINES = {
    "round_robin": _baseline("round_robin", _round_robin, equal_slots=False),
    "greedy": _baseline("greedy", _greedy, equal_slots=False),
    "eplb_global": _baseline("eplb_global", _eplb_global, equal_slots=True),
    "eplb_hierarchical": _baseline("eplb_hierarchical", _eplb_hierarchical, equal_slots=True),
}
