"""The exact method: local search first, then one integer program per layer that it did not prove."""

from __future__ import annotations

from functools import partial

import numpy as np

from .align import aligned
from .assemble import layout_of, placement_of
from .bounds import problem_bound
from .cost import evaluate
from .fields import BoolArray
from .layer_program import add_layer
from .layer_search import LayerSearch, case_times
from .layout import Layout
from .milp import MilpOptions, MilpResult, pulp, solve_milp
from .params import Params
from .placement import Placement
from .price_bound import Pricing
from .problem import Objective, PlacementProblem
from .scalable import Report, Run, within
from .solution import Infeasible, Lack, Solution, StoppingRule
from .units import LayerProblem, layer_problems

HEURISTIC_PART = 0.2
"""Part of the time limit that the local search before the programs may take."""


def solve_ilp(
    problem: PlacementProblem,
    params: Params,
    stop: StoppingRule,
    report: Report | None = None,
    start: Placement | None = None,
) -> Solution | Infeasible:
    """Solve every layer exactly, as far as the time limit allows.

    Of communication only its least value is in the bound; layers are aligned for it afterwards (`align`).
    """
    began_s = stop.now()
    layers = layer_problems(problem)
    starts = [None if start is None else layout_of(problem, layer, start) for layer in layers]
    pricing = Pricing()
    searches = [LayerSearch(la, problem.objective, params, st, pricing) for la, st in zip(layers, starts, strict=True)]
    part = StoppingRule(stop.time_limit_s * HEURISTIC_PART, stop.gap, stop.iterations, stop.now)
    run = Run(searches, part, report, began_s)
    run.start()
    run.improve()
    outcomes = []
    for done, search in enumerate(searches):
        left_s = stop.time_limit_s - (stop.now() - began_s)
        outcomes.append(_prove(search, params, stop.gap, left_s / (len(layers) - done)))
    lost = [s.layer for s, status in zip(searches, outcomes, strict=True) if s.best is None]
    if lost:
        proven = all(status == "infeasible" for s, status in zip(searches, outcomes, strict=True) if s.best is None)
        return Infeasible(tuple(_lack(layer) for layer in lost), proven=proven)
    layouts = [s.best for s in searches if s.best is not None]
    in_time = partial(within, stop, began_s)
    placement = placement_of(problem, layers, aligned(problem, layers, layouts, in_time))
    bound = problem_bound(problem, layers, np.array([s.bound_s for s in searches]))
    reason = "optimal" if all(status == "optimal" for status in outcomes) else "time limit"
    return Solution(placement, evaluate(problem, placement), bound, reason, "ilp")


def _prove(search: LayerSearch, params: Params, gap: float, limit_s: float) -> str:
    """Run the layer's program unless its gap is closed; the search keeps the better layout and bound."""
    if search.best is not None and search.excess_s <= gap * search.cost_s:
        return "optimal"
    if limit_s <= 0:
        return "unknown"
    layer = search.layer
    scale = 1.0 / search.bound_s
    model = pulp.LpProblem(f"layer{layer.layer}", pulp.LpMinimize)
    offered_UD = columns(layer, search.best, params.columns)
    program = add_layer(model, layer.scaled(scale), search.objective, offered_UD)
    model += program.cost
    if search.best is not None:
        program.begin_from(search.best, case_times(layer, search.best, Objective()).max(axis=1) * scale)
    options = MilpOptions(limit_s, gap, seed=params.seed, warm_start=search.best is not None)
    result = solve_milp(model, options)
    if result.found:
        search.offer(program.layout())
    restricted = not offered_UD.all()
    if not restricted and result.bound is not None:
        search.raise_bound(result.bound / scale)
    return _status(result, search, gap, restricted)


def _status(result: MilpResult, search: LayerSearch, gap: float, restricted: bool) -> str:
    if search.best is None:
        return result.status
    if search.excess_s <= gap * search.cost_s * 1.01:
        return "optimal"
    return "restricted" if restricted else result.status


def columns(layer: LayerProblem, layout: Layout | None, count: int) -> BoolArray:
    """Devices offered to each unit: all, or where it is now plus those with the least time there."""
    offered_UD = np.ones((layer.units, layer.devices), dtype=np.bool_)
    if layout is None or count == 0 or count >= layer.devices:
        return offered_UD
    work_D = np.bincount(layout.device_R, weights=layout.tokens_R, minlength=layer.devices)
    time_D = work_D * layer.token_s_D
    offered_UD[:] = False
    offered_UD[layout.unit_R, layout.device_R] = True
    offered_UD |= layer.pinned_UD
    spread = np.argsort(time_D, kind="stable")
    for u in range(layer.units):
        offered_UD[u, np.roll(spread, -u * count)[:count]] = True
    return offered_UD


def _lack(layer: LayerProblem) -> Lack:
    need = float(layer.width_U.sum() * layer.min_nodes)
    return Lack(f"layer {layer.layer}: rules and room together", need, float(layer.slots_D.sum()), "slots")
