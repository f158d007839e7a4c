"""From a problem to a plan document: a fresh plan or a re-plan, the migration to it, and whether it is worth it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import OperatorError
from ..planners.advise import Horizon, advise
from ..planners.assignment import match_placement
from ..planners.cluster import Cluster
from ..planners.fields import IntArray
from ..planners.migrate import plan_migration
from ..planners.migration import MigrationProblem, Transport
from ..planners.params import Params
from ..planners.placement import balanced_placement
from ..planners.problem import PlacementProblem
from ..planners.replan import Replan, ReplanRules, replan
from ..planners.sampled import PLANS, lower_bound, solve_sampled
from ..planners.scenarios import Sampling
from ..planners.solution import Infeasible, Progress, Solution, StoppingRule
from ..planners.solve import METHODS, solve
from .plandoc import PlanDocument

PLAN_METHODS = (*METHODS, "robust", "replan")


@dataclass(frozen=True)
class PlanChoices:
    """How to plan.

    Parameters
    ----------
    method : str
        One of `PLAN_METHODS`; ``auto`` re-plans where there is a current placement. ``robust`` plans for the loads
        given and for others that may follow them (`solve_sampled`), and splits tokens per batch.
    balance : float
        What a re-plan must reach, see `ReplanRules`.
    stop : StoppingRule
    seed : int
    horizon : Horizon
        For weighing a migration.
    transport : Transport
    """

    method: str = "auto"
    balance: float = 0.98
    stop: StoppingRule = field(default_factory=StoppingRule)
    seed: int = 0
    horizon: Horizon = field(default_factory=Horizon)
    transport: Transport = field(default_factory=Transport)


def make_plan(
    problem: PlacementProblem, alive: Cluster, choices: PlanChoices, progress: Callable[[Progress], None] | None = None
) -> PlanDocument:
    """Plan, and where there is a current placement, order the migration and weigh it.

    Parameters
    ----------
    alive : Cluster
        The problem's devices, and those that leave but can still be read from.

    Raises
    ------
    OperatorError
        Infeasible; the message names what does not fit, by how much.
    """
    if choices.method == "replan" or (choices.method == "auto" and problem.current is not None):
        document = _replanned(problem, choices, progress)
    else:
        document = _fresh(problem, alive, choices, progress)
    if problem.current is None:
        return document
    return _with_migration(document, alive, choices)


def _replanned(
    problem: PlacementProblem, choices: PlanChoices, progress: Callable[[Progress], None] | None
) -> PlanDocument:
    answer = replan(problem, ReplanRules(choices.balance, seed=choices.seed, stop=choices.stop), progress)
    if isinstance(answer, Infeasible):
        raise OperatorError(f"plan: {answer}")
    note = _missed(answer, choices.balance) if answer.missed else None
    bound_s = float(answer.bound_L.sum())
    return PlanDocument(problem, answer.placement, problem.current, "replan", answer.reason, bound_s, note=note)


def _missed(answer: Replan, balance: float) -> str:
    worst = int(np.argmin(answer.balance_L))
    return (
        f"{len(answer.missed)} layers are below the balance of {balance:g} "
        f"(layer {worst}: {answer.balance_L[worst]:.3f}); more spare slots would help"
    )


def _fresh(
    problem: PlacementProblem, alive: Cluster, choices: PlanChoices, progress: Callable[[Progress], None] | None
) -> PlanDocument:
    robust = choices.method == "robust"
    if robust:
        problem = replace(problem, objective=replace(problem.objective, split="per_batch"))
        answer = _solve_robust(problem, choices)
    else:
        answer = solve(problem, choices.method, Params(seed=choices.seed), choices.stop, progress)
    if isinstance(answer, Infeasible):
        raise OperatorError(f"plan: {answer}")
    before, placement = problem.current, answer.placement
    if before is None:
        before = balanced_placement(problem.cluster.names, problem.layers, problem.experts)
    elif not _has_rules(problem):
        placement = match_placement(before, placement, alive)
    if robust:  # cost, bound and gap of the answer are those under samples, which the document does not have
        reason = f"{answer.reason}; layers from the best of {PLANS} plans, by samples that none had seen"
        return PlanDocument(problem, placement, before, "robust", reason, lower_bound(problem))
    return PlanDocument(problem, placement, before, answer.method, _reason(answer), answer.bound)


def _solve_robust(problem: PlacementProblem, choices: PlanChoices) -> Solution | Infeasible:
    """Within the time limit, which `solve_sampled` takes for each of its searches."""
    stop = replace(choices.stop, time_limit_s=choices.stop.time_limit_s / PLANS)
    return solve_sampled(problem, Sampling(seed=choices.seed * (PLANS + 1)), stop)


def _has_rules(problem: PlacementProblem) -> bool:
    """Whether single devices matter, so that alike ones must not be exchanged."""
    options = problem.options
    slots = problem.slots_LD
    return bool(options.pinned or options.forbidden or (slots != slots[:, :1]).any())


def _reason(answer: Solution) -> str:
    return f"{answer.reason}, gap {100 * answer.gap:.2f} %"


def _with_migration(document: PlanDocument, alive: Cluster, choices: PlanChoices) -> PlanDocument:
    problem, before = document.problem, document.before
    assert before is not None
    move = MigrationProblem(
        alive,
        problem.model,
        before,
        document.placement,
        reserve_bytes=problem.options.memory_reserve_bytes,
        transport=choices.transport,
    )
    migration = plan_migration(move)
    if isinstance(migration, Infeasible):
        notes = (document.note, f"no order of moves within memory: {migration}")
        return replace(document, note="; ".join(n for n in notes if n))
    advice = advise(problem, migration.placement, migration, choices.horizon)
    return replace(document, placement=migration.placement, migration=migration, advice=advice)


def spread_slots(experts: int, spare: int, cluster: Cluster) -> IntArray:
    """Slots per device for every expert once and ``spare`` more, in proportion to memory; shape (D,)."""
    total = experts + spare
    part_D = cluster.memory_bytes_D / cluster.memory_bytes_D.sum() * total
    slots_D: IntArray = np.floor(part_D).astype(np.int64)
    rest = np.argsort(-(part_D - slots_D), kind="stable")[: total - int(slots_D.sum())]
    slots_D[rest] += 1
    return slots_D
