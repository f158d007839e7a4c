"""An independent checker: plain loops written from ``planners/README.md``, sharing no code with solvers or cost model.

It reads only the nouns (problem, placement, solution) and says everything that is wrong with an answer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from .milp import pulp
from .placement import Placement
from .problem import PlacementProblem
from .solution import Solution

TOLERANCE = 1e-6
"""Relative difference of costs that passes."""


def check(problem: PlacementProblem, solution: Solution) -> list[str]:
    """Everything that is wrong with a solution: broken rules, wrong cost, a bound above the cost. Empty if sound."""
    found = check_placement(problem, solution.placement)
    if found:
        return found
    cost = recount(problem, solution.placement)
    for term, value in cost.items():
        claimed = solution.cost.to_dict()[term]
        if not math.isclose(claimed, value, rel_tol=TOLERANCE, abs_tol=TOLERANCE * max(cost["total_s"], 1e-300)):
            found.append(f"cost: {term}: claimed {claimed!r}, recounted {value!r}")
    if solution.bound > cost["total_s"] * (1 + TOLERANCE):
        found.append(f"bound {solution.bound!r} is above the cost {cost['total_s']!r}")
    return found


def check_placement(problem: PlacementProblem, placement: Placement) -> list[str]:
    """Every rule of the problem (eq. 1 to 3 and `Options`) that the placement breaks."""
    if placement.devices != tuple(d.name for d in problem.cluster.devices):
        return [f"devices {placement.devices} are not the cluster's"]
    if (placement.layers, placement.experts) != (problem.layers, problem.experts):
        return [
            f"{placement.layers} layers of {placement.experts} experts: expected {problem.layers}, {problem.experts}"
        ]
    found = [*_shares(placement), *_room(problem, placement)]
    for layer in range(problem.layers):
        found += _layer_rules(problem, placement, layer)
    return found


def _shares(placement: Placement) -> Iterator[str]:
    for layer, experts in enumerate(placement.replicas_LE):
        for expert, replicas in enumerate(experts):
            where = f"layer {layer}, expert {expert}"
            if not replicas:
                yield f"{where}: no replica"
            if abs(sum(r.share for r in replicas) - 1) > TOLERANCE or any(r.share <= 0 for r in replicas):
                yield f"{where}: shares {[r.share for r in replicas]}"
            if len({r.device for r in replicas}) < len(replicas):
                yield f"{where}: two replicas on one device"


def _room(problem: PlacementProblem, placement: Placement) -> Iterator[str]:
    """Eq. 2 and 3, and the memory of each device over all layers."""
    for d, device in enumerate(problem.cluster.devices):
        held = problem.model.shared_bytes * problem.layers + problem.options.memory_reserve_bytes
        for layer, experts in enumerate(placement.replicas_LE):
            here = [e for e, replicas in enumerate(experts) if any(r.device == d for r in replicas)]
            layer_bytes = sum(float(problem.model.bytes_LE[layer, e]) for e in here)
            held += layer_bytes
            if len(here) > problem.slots_LD[layer, d]:
                yield f"layer {layer}, device {device.name!r}: {len(here)} replicas, {problem.slots_LD[layer, d]} slots"
            if layer_bytes > problem.budget_bytes_LD[layer, d] * (1 + TOLERANCE):
                yield f"layer {layer}, device {device.name!r}: {layer_bytes} bytes, budget exceeded"
        if held > device.memory_bytes * (1 + TOLERANCE):
            yield f"device {device.name!r}: {held} bytes needed, {device.memory_bytes} there"


def _layer_rules(problem: PlacementProblem, placement: Placement, layer: int) -> Iterator[str]:
    options, devices = problem.options, problem.cluster.devices
    on = [{devices[r.device].name for r in replicas} for replicas in placement.replicas_LE[layer]]
    node_of = {d.name: d.node for d in devices}
    for expert, names in enumerate(on):
        nodes = {node_of[name] for name in names}
        if len(nodes) < options.min_nodes:
            yield f"layer {layer}, expert {expert}: on {len(nodes)} nodes, {options.min_nodes} wanted"
    for pair in options.pinned:
        if pair.layer in (None, layer) and pair.device not in on[pair.expert]:
            yield f"layer {layer}, expert {pair.expert}: not on {pair.device!r}, where it is pinned"
    for pair in options.forbidden:
        if pair.layer in (None, layer) and pair.device in on[pair.expert]:
            yield f"layer {layer}, expert {pair.expert}: on {pair.device!r}, which is forbidden"
    for group in options.groups:
        if any(on[e] != on[group[0]] for e in group):
            yield f"layer {layer}: group {group} is not together"


def recount(problem: PlacementProblem, placement: Placement) -> dict[str, float]:
    """The cost by term, counted afresh (eq. 4 to 10)."""
    step = sum(_layer_step(problem, placement, layer) for layer in range(problem.layers))
    node, cluster = _communication(problem, placement)
    moves = _moved_bytes(problem, placement) * problem.prices.moved_byte_s
    total = step + node + cluster + moves
    return {"total_s": total, "step_s": step, "node_s": node, "cluster_s": cluster, "moves_s": moves}


def _layer_step(problem: PlacementProblem, placement: Placement, layer: int) -> float:
    """Eq. 7 and 8: mean over regimes, then the worst part of the scenarios."""
    regimes, tail = problem.objective.regimes, problem.objective.tail
    weight = sum(r.weight for r in regimes)
    outcomes = []
    for s, scenario_weight in enumerate(problem.loads.scenario_weights_S):
        mean = 0.0
        for regime in regimes:
            tokens = [float(t) * regime.token_scale for t in problem.loads.tokens_SLE[s, layer]]
            mean += regime.weight / weight * _slowest(problem, placement, layer, tokens)
        outcomes.append((mean, float(scenario_weight)))
    left, total = 1.0 - tail, 0.0
    for mean, scenario_weight in sorted(outcomes, reverse=True):
        part = min(left, scenario_weight)
        total += part * mean
        left -= part
    return total / (1.0 - tail)


def _slowest(problem: PlacementProblem, placement: Placement, layer: int, tokens: list[float]) -> float:
    """Eq. 4 or 6: the slowest device's time."""
    model, devices = problem.model, problem.cluster.devices
    local = sum(tokens) / model.top_k / len(devices)
    time = [model.shared_bytes / d.bandwidth_bytes_s + local * model.shared_flops_per_token / d.flops for d in devices]
    for expert, replicas in enumerate(placement.replicas_LE[layer]):
        for r in replicas:
            time[r.device] += float(model.bytes_LE[layer, expert]) / devices[r.device].bandwidth_bytes_s
    rate = [model.flops_per_token / d.flops for d in devices]
    if problem.objective.split == "per_batch":
        return _best_split(placement, layer, tokens, rate, time)
    for expert, replicas in enumerate(placement.replicas_LE[layer]):
        for r in replicas:
            time[r.device] += tokens[expert] * r.share * rate[r.device]
    return max(time)


def _best_split(placement: Placement, layer: int, tokens: list[float], rate: list[float], fixed: list[float]) -> float:
    """Eq. 6 as a linear program."""
    unit = max(fixed[d] + rate[d] * sum(tokens) for d in range(len(rate)))
    if unit == 0:
        return 0.0
    model = pulp.LpProblem("check", pulp.LpMinimize)
    longest = pulp.LpVariable("longest", 0)
    model += longest
    work = defaultdict(list)
    for expert, replicas in enumerate(placement.replicas_LE[layer]):
        parts = [pulp.LpVariable(f"p{expert}_{r.device}", 0, 1) for r in replicas]
        model += pulp.lpSum(parts) == 1
        for r, part in zip(replicas, parts, strict=True):
            work[r.device].append(tokens[expert] * rate[r.device] / unit * part)
    for d in range(len(rate)):
        model += longest >= fixed[d] / unit + pulp.lpSum(work[d])
    model.solve(pulp.HiGHS(msg=False))
    return float(pulp.value(model.objective)) * unit


def _communication(problem: PlacementProblem, placement: Placement) -> tuple[float, float]:
    """Eq. 5: link seconds within and between nodes."""
    devices, links = problem.cluster.devices, problem.cluster.links
    count = len(devices)
    on_node = {d.node: sum(x.node == d.node for x in devices) for d in devices}
    node = cluster = 0.0
    each = problem.model.hidden_bytes / count
    for layer in range(problem.layers):
        tokens = _mean_tokens(problem, layer)
        if layer > 0 and problem.loads.pairs_PEE is not None:
            near, far = _hops(problem, placement, layer, tokens)
            node += near * each / links.node_bytes_s
            cluster += far * each / links.cluster_bytes_s
            continue
        for expert, replicas in enumerate(placement.replicas_LE[layer]):
            for r in replicas:
                same = on_node[devices[r.device].node] / count
                sent = 2 * tokens[expert] * r.share * each
                node += sent * (same - 1 / count) / links.node_bytes_s
                cluster += sent * (1 - same) / links.cluster_bytes_s
    return node, cluster


def _mean_tokens(problem: PlacementProblem, layer: int) -> list[float]:
    regimes = problem.objective.regimes
    scale = sum(r.weight * r.token_scale for r in regimes) / sum(r.weight for r in regimes)
    weights = problem.loads.scenario_weights_S
    return [
        scale * sum(float(w * problem.loads.tokens_SLE[s, layer, e]) for s, w in enumerate(weights))
        for e in range(problem.experts)
    ]


def _hops(problem: PlacementProblem, placement: Placement, layer: int, tokens: list[float]) -> tuple[float, float]:
    """Tokens that move within a node, and between nodes, from the layer before."""
    assert problem.loads.pairs_PEE is not None
    pairs = problem.loads.pairs_PEE[layer - 1]
    node_of = [d.node for d in problem.cluster.devices]
    near = far = 0.0
    for b, to in enumerate(placement.replicas_LE[layer]):
        column = float(pairs[:, b].sum())
        for a, source in enumerate(placement.replicas_LE[layer - 1]):
            part = float(pairs[a, b]) / column if column > 0 else 1 / problem.experts
            here, there = {r.device: r.share for r in source}, {r.device: r.share for r in to}
            stay = sum(min(share, there.get(d, 0.0)) for d, share in here.items())
            from_node: dict[str, float] = defaultdict(float)
            to_node: dict[str, float] = defaultdict(float)
            for d, share in here.items():
                from_node[node_of[d]] += share
            for d, share in there.items():
                to_node[node_of[d]] += share
            in_node = sum(min(share, to_node[n]) for n, share in from_node.items())
            near += tokens[b] * part * (in_node - stay)
            far += tokens[b] * part * (1 - in_node)
    return near, far


def _moved_bytes(problem: PlacementProblem, placement: Placement) -> float:
    """Eq. 9: bytes of replicas that are not in the current placement."""
    if problem.current is None:
        return 0.0
    had = set()
    for layer, experts in enumerate(problem.current.replicas_LE):
        for expert, replicas in enumerate(experts):
            had |= {(layer, expert, problem.current.devices[r.device]) for r in replicas}
    moved = 0.0
    for layer, experts in enumerate(placement.replicas_LE):
        for expert, replicas in enumerate(experts):
            new = [r for r in replicas if (layer, expert, placement.devices[r.device]) not in had]
            moved += len(new) * float(problem.model.bytes_LE[layer, expert])
    return moved
