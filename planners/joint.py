"""All layers in one integer program, with affinity between neighbouring layers (eq. 5): exact, for small problems."""

from __future__ import annotations

from typing import Any

import numpy as np

from .assemble import layout_of, placement_of
from .bounds import problem_bound, step_bound
from .comm import flow_pairs, home_seconds_per_token_D
from .cost import evaluate
from .fields import FloatArray, fail
from .layer_program import LayerProgram, add_layer
from .layer_search import case_times
from .milp import MilpOptions, pulp, solve_milp
from .params import Params
from .placement import Placement
from .problem import PlacementProblem
from .scalable import Report, solve_scalable
from .solution import Infeasible, Lack, Solution, StoppingRule
from .units import LayerProblem, layer_problems

MOST_PRODUCTS = 60_000
"""Most (pair, device) products in one program; more would take minutes to build."""
START_PART = 0.2
"""Part of the time limit for the layer-by-layer start."""


def products(problem: PlacementProblem) -> int:
    """Size of the joint program: pairs of experts in neighbouring layers, on every device."""
    if problem.loads.pairs_PEE is None:
        return problem.layers * problem.experts * problem.devices
    return int((problem.loads.pairs_PEE > 0).sum()) * problem.devices


def solve_joint(
    problem: PlacementProblem,
    params: Params,
    stop: StoppingRule,
    report: Report | None = None,
    start: Placement | None = None,
) -> Solution | Infeasible:
    """Minimise eq. 10 over all layers at once, shares fixed over scenarios.

    Raises
    ------
    OperatorError
        The problem is too large for one program, or its shares are re-split per batch.
    """
    if products(problem) > MOST_PRODUCTS:
        fail("method 'joint': products of pairs and devices", products(problem), f"at most {MOST_PRODUCTS}")
    if problem.objective.split != "fixed":
        fail("method 'joint': objective: split", problem.objective.split, "'fixed'")
    part = StoppingRule(stop.time_limit_s * START_PART, stop.gap, stop.iterations, stop.now)
    first = solve_scalable(problem, params, part, report, start)
    layers = layer_problems(problem)
    scale = _scale(problem, layers)
    model = pulp.LpProblem("joint", pulp.LpMinimize)
    everywhere = np.ones((layers[0].units, problem.devices), dtype=np.bool_)
    programs = [add_layer(model, la.scaled(scale), problem.objective, everywhere) for la in layers]
    hops = _Hops(problem, layers, programs, scale)
    model += pulp.lpSum(p.cost for p in programs) + hops.cost(model)
    if isinstance(first, Solution):
        _begin(problem, layers, programs, hops, first.placement, scale)
    options = MilpOptions(stop.time_limit_s, stop.gap, seed=params.seed, warm_start=isinstance(first, Solution))
    result = solve_milp(model, options)
    if not result.found:
        proven = result.status == "infeasible"
        slots = float(problem.slots_LD.sum())
        need = float(problem.layers * problem.experts * problem.options.min_nodes)
        lack = Lack("all layers: rules and room together", need, slots, "slots")
        return first if isinstance(first, Solution) else Infeasible((lack,), proven=proven)
    placement = placement_of(problem, layers, [p.layout() for p in programs])
    cost = evaluate(problem, placement)
    if isinstance(first, Solution) and first.cost.total < cost.total:
        placement, cost = first.placement, first.cost
    step_L = np.array([step_bound(la, problem.objective.tail, False) for la in layers])
    bound = max(problem_bound(problem, layers, step_L), (result.bound or 0.0) / scale)
    reason = "optimal" if result.status == "optimal" else "time limit"
    return Solution(placement, cost, min(bound, cost.total), reason, "joint")


def _scale(problem: PlacementProblem, layers: list[LayerProblem]) -> float:
    return 1.0 / max(step_bound(la, problem.objective.tail, False) for la in layers)


class _Hops:
    """Communication (eq. 5) as linear terms: tokens kept on a device, or in a node, save link time."""

    def __init__(
        self, problem: PlacementProblem, layers: list[LayerProblem], programs: list[LayerProgram], scale: float
    ) -> None:
        self.problem = problem
        self.layers = layers
        self.programs = programs
        bytes_each = problem.model.hidden_bytes / problem.devices * scale
        self.node_s = bytes_each / problem.cluster.links.node_bytes_s
        self.cluster_s = bytes_each / problem.cluster.links.cluster_bytes_s
        self.scale = scale
        self.kept: list[tuple[int, int, int, tuple[int, ...], Any]] = []

    def cost(self, model: Any) -> Any:
        """The expression; adds its variables and constraints."""
        terms = []
        for index in range(len(self.layers)):
            if index == 0 or self.problem.loads.pairs_PEE is None:
                terms.append(self._from_home(index))
            elif self.cluster_s > 0:
                terms.append(self._from_layer(model, index))
        return pulp.lpSum(terms)

    def _from_home(self, index: int) -> Any:
        node_D, cluster_D = home_seconds_per_token_D(self.problem)
        each_D = (node_D + cluster_D) * self.scale
        tokens_U = self.layers[index].tokens_U
        share = self.programs[index].share[0]
        return pulp.lpSum(float(tokens_U[u] * each_D[d]) * y for (u, d), y in share.items())

    def _from_layer(self, model: Any, index: int) -> Any:
        pairs_UU = unit_pairs(self.problem, self.layers[index], index)
        devices = [(d,) for d in range(self.problem.devices)]
        node_D = self.problem.cluster.node_D
        nodes = [tuple(np.flatnonzero(node_D == n).tolist()) for n in range(int(node_D.max()) + 1)]
        terms = [self.cluster_s * float(pairs_UU.sum())]
        for a, b in zip(*np.nonzero(pairs_UU), strict=True):
            tokens = float(pairs_UU[a, b])
            for places, saving in ((devices, self.node_s), (nodes, self.cluster_s - self.node_s)):
                kept = [self._kept(model, index, (int(a), int(b)), place) for place in places]
                terms.append(-tokens * saving * pulp.lpSum(kept))
        return pulp.lpSum(terms)

    def _kept(self, model: Any, index: int, pair: tuple[int, int], place: tuple[int, ...]) -> Any:
        a, b = pair
        kind = "d" if len(place) == 1 else "n"
        variable = pulp.LpVariable(f"k{kind}_{index}_{a}_{b}_{place[0]}", 0, 1)
        for unit, program in ((a, self.programs[index - 1]), (b, self.programs[index])):
            model += variable <= pulp.lpSum(program.share[0][unit, d] for d in place if (unit, d) in program.share[0])
        self.kept.append((index, a, b, place, variable))
        return variable

    def begin_from(self, share_LUD: list[FloatArray]) -> None:
        """Set the variables to the shares of a placement."""
        for index, a, b, place, variable in self.kept:
            here = list(place)
            value = min(share_LUD[index - 1][a, here].sum(), share_LUD[index][b, here].sum())
            variable.setInitialValue(min(1.0, float(value)))


def unit_pairs(problem: PlacementProblem, layer: LayerProblem, index: int) -> FloatArray:
    """Tokens from units of the layer before to units of this one, mean over cases."""
    members = layer.members
    regimes = problem.objective.regimes
    scale = sum(r.weight * r.token_scale for r in regimes) / sum(r.weight for r in regimes)
    tokens_E = problem.loads.mean_LE[index] * scale
    member_UE = np.zeros((len(members), problem.experts))
    for u, m in enumerate(members):
        member_UE[u, list(m)] = 1.0
    pairs: FloatArray = member_UE @ flow_pairs(problem, index, tokens_E) @ member_UE.T
    return pairs


def _begin(
    problem: PlacementProblem,
    layers: list[LayerProblem],
    programs: list[LayerProgram],
    hops: _Hops,
    placement: Placement,
    scale: float,
) -> None:
    share_LUD = []
    for layer, program in zip(layers, programs, strict=True):
        layout = layout_of(problem, layer, placement)
        assert layout is not None
        program.begin_from(layout, case_times(layer, layout, problem.objective).max(axis=1) * scale)
        share_UD = np.zeros((layer.units, layer.devices))
        total_U = np.maximum(layer.tokens_U, 1e-300)
        share_UD[layout.unit_R, layout.device_R] = layout.tokens_R / total_U[layout.unit_R]
        share_LUD.append(share_UD)
    hops.begin_from(share_LUD)
