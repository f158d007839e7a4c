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
PAIR = 2
"""Replicas of its busiest expert from which on a sample that no plan can balance counts less (eq. 23)."""


def judging(problem: PlacementProblem, sampling: Sampling | None = None) -> PlacementProblem:
    """The problem under the samples by which `solve_sampled` judges: other ones than plans know."""
    sampling = sampling or Sampling()
    return sampled(problem, replace(sampling, seed=sampling.seed + PLANS))


def sampled(problem: PlacementProblem, sampling: Sampling) -> PlacementProblem:
    """The problem under its scenarios and sampled ones, these in proportion to what can be done about them (eq. 23).

    A sample whose busiest expert overfills a pair of devices costs much in any plan; unscaled, it would outweigh many
    samples that a plan can balance or not.
    """
    loads = with_samples(problem.loads, sampling)
    tokens_SLE = loads.tokens_SLE.copy()
    drawn_NLE = tokens_SLE[len(problem.loads.tokens_SLE) :]
    even_NL1 = drawn_NLE.sum(axis=2, keepdims=True) / problem.devices
    drawn_NLE *= even_NL1 / np.maximum(np.maximum(even_NL1, drawn_NLE.max(axis=2, keepdims=True) / PAIR), 1e-300)
    return replace(problem, loads=replace(loads, tokens_SLE=tokens_SLE))


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
        known = sampled(problem, replace(sampling, seed=sampling.seed + plan))
        answer = solve(known, "scalable", stop=stop)
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
