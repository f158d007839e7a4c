"""Planning for loads not seen yet: several plans, each for samples of its own, judged on samples that none has seen.

A search fits its samples, and where they are easily held, which of many fitting plans it meets is chance. Fresh samples
tell such plans apart (sample average approximation with replications, Kleywegt, Shapiro and Homem-de-Mello 2002).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .bounds import problem_bound, step_bound
from .cost import evaluate
from .placement import Placement
from .problem import PlacementProblem
from .scenarios import Sampling, with_samples
from .solution import Infeasible, Solution, StoppingRule
from .solve import solve
from .units import layer_problems

PLANS = 4
"""Plans to choose from."""
JUDGES = 4
"""Samples to judge by, in samples that one plan is made for."""


def judging(problem: PlacementProblem, sampling: Sampling | None = None) -> PlacementProblem:
    """The problem under the samples by which `solve_sampled` judges: more of them, and other ones than plans know."""
    sampling = sampling or Sampling()
    more = replace(sampling, seed=sampling.seed + PLANS, count=JUDGES * sampling.count)
    return replace(problem, loads=with_samples(problem.loads, more))


def lower_bound(problem: PlacementProblem) -> float:
    """Seconds per step (eq. 10) that no placement can beat."""
    objective, parts = problem.objective, layer_problems(problem)
    step_L = np.array([step_bound(part, objective.tail, objective.split == "per_batch") for part in parts])
    return problem_bound(problem, parts, step_L)


def solve_sampled(
    problem: PlacementProblem, sampling: Sampling | None = None, stop: StoppingRule | None = None
) -> Solution | Infeasible:
    """Place the experts for the problem's scenarios and those sampled from them (`with_samples`).

    Layers that do not depend on each other, without affinity or a current placement, are taken from different plans.

    Parameters
    ----------
    problem : PlacementProblem
        With the seen scenarios only.
    sampling : Sampling, optional
    stop : StoppingRule, optional
        For each of `PLANS` searches.

    Returns
    -------
    Solution or Infeasible
        Cost, bound and gap are those of the `judging` problem.
    """
    sampling = sampling or Sampling()
    found: list[Solution] = []
    for plan in range(PLANS):
        loads = with_samples(problem.loads, replace(sampling, seed=sampling.seed + plan))
        answer = solve(replace(problem, loads=loads), "scalable", stop=stop)
        if isinstance(answer, Infeasible):
            return answer
        found.append(answer)
    judge = judging(problem, sampling)
    costs = [evaluate(judge, answer.placement) for answer in found]
    best = int(np.argmin([cost.total for cost in costs]))
    placement = found[best].placement
    if problem.current is None and problem.loads.pairs_PEE is None:
        by_layer = np.argmin([cost.step_L + cost.node_L + cost.cluster_L for cost in costs], axis=0)
        layers = tuple(found[k].placement.replicas_LE[layer] for layer, k in enumerate(by_layer.tolist()))
        placement = Placement(placement.devices, layers)
    return Solution(placement, evaluate(judge, placement), lower_bound(judge), found[best].reason, "scalable")
