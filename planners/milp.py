"""One door to the integer-program solvers: PuLP with HiGHS, or CBC, and an honest answer read back.

PuLP 3.x reports ``Optimal`` when a solver stopped at its time limit, and an objective of 0.0 where no solution
was found; here the solver's own incumbent, bound and reason for stopping are read instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pulp as _pulp

pulp: Any = _pulp  # PuLP's own annotations are too partial for strict checking
Backend = Literal["auto", "highs", "cbc"]
MilpStatus = Literal["optimal", "feasible", "infeasible", "unknown"]


@dataclass(frozen=True, slots=True)
class MilpOptions:
    """How to solve.

    Parameters
    ----------
    time_limit_s : float or None
        Stop after this many seconds with the best solution so far.
    gap : float
        Relative gap at which a solution counts as optimal.
    backend : str
        ``highs``, ``cbc``, or ``auto``: HiGHS where it is installed, else CBC.
    seed : int
        Seed of the solver's own random choices; one thread, so that the same seed gives the same answer.
    node_limit : int or None
        Stop after this many branch-and-bound nodes: unlike a time limit, the same on every machine.
    warm_start : bool
        Start from the variables' initial values (all must be set).
    """

    time_limit_s: float | None = None
    gap: float = 1e-6
    backend: Backend = "auto"
    seed: int = 0
    node_limit: int | None = None
    warm_start: bool = False


@dataclass(frozen=True, slots=True)
class MilpResult:
    """What a solver found; variables keep their values in the model when there is an incumbent.

    ``optimal``: proved to the gap asked for. ``feasible``: stopped with an incumbent. ``infeasible``: proved.
    ``unknown``: stopped without an incumbent. ``bound`` is None where the solver does not tell (CBC at a limit).
    """

    status: MilpStatus
    objective: float | None
    bound: float | None

    @property
    def found(self) -> bool:
        return self.objective is not None


class _Highs(pulp.HiGHS):  # type: ignore[misc]
    """PuLP's HiGHS with a starting solution (the variables' values) and node limits."""

    warm_start = False

    def callSolver(self, lp: Any) -> None:
        if self.warm_start:
            variables = lp.variables()
            indices = [v.index for v in variables]
            lp.solverModel.setSolution(len(indices), indices, [float(v.varValue) for v in variables])
        super().callSolver(lp)

    def findSolutionValues(self, lp: Any) -> tuple[int, int]:
        try:
            found: tuple[int, int] = super().findSolutionValues(lp)
        except KeyError:  # PuLP 3.3 has set all values but knows no status for HiGHS' node limit
            return pulp.LpStatusOptimal, pulp.LpSolutionIntegerFeasible
        return found


def solve_milp(model: Any, options: MilpOptions | None = None) -> MilpResult:
    """Minimise ``model`` (a `pulp.LpProblem`) and say truthfully how far it came.

    Raises
    ------
    ValueError
        The model maximises, or a backend was named that is not installed.
    """
    options = options or MilpOptions()
    if model.sense != pulp.LpMinimize:
        raise ValueError("solve_milp: expected a minimisation")
    if _backend(options.backend) == "highs":
        return _solve_highs(model, options)
    return _solve_cbc(model, options)


def _backend(wanted: Backend) -> Backend:
    have_highs = bool(pulp.HiGHS(msg=False).available())
    if wanted == "auto":
        return "highs" if have_highs else "cbc"
    if wanted == "highs" and not have_highs:
        raise ValueError("solve_milp: backend 'highs': highspy is not installed")
    return wanted


def _solve_highs(model: Any, options: MilpOptions) -> MilpResult:
    limits = {} if options.node_limit is None else {"mip_max_nodes": options.node_limit}
    solver = _Highs(
        msg=False,
        **limits,
        gapRel=options.gap,
        timeLimit=options.time_limit_s,
        threads=1,
        random_seed=options.seed % 2**31,
    )
    solver.warm_start = options.warm_start
    model.solve(solver)
    if model.status in (pulp.LpStatusInfeasible, pulp.LpStatusUnbounded):
        return MilpResult("infeasible", None, None)
    highs = model.solverModel
    info = highs.getInfo()
    constant = float(model.objective.constant)
    is_mip = any(v.cat == pulp.LpInteger for v in model.variables())
    bound = float(info.mip_dual_bound) + constant if is_mip else None
    bound = bound if bound is not None and math.isfinite(bound) else None
    if info.primal_solution_status != 2:  # HiGHS' kSolutionStatusFeasible
        return MilpResult("unknown", None, bound)
    objective = float(info.objective_function_value) + constant
    if model.sol_status != pulp.LpSolutionOptimal:
        return MilpResult("feasible", objective, bound)
    return MilpResult("optimal", objective, objective if bound is None else bound)


def _solve_cbc(model: Any, options: MilpOptions) -> MilpResult:
    solver = pulp.PULP_CBC_CMD(
        msg=False,
        gapRel=options.gap,
        timeLimit=options.time_limit_s,
        threads=1,
        warmStart=options.warm_start,
        maxNodes=options.node_limit,
        options=[f"randomCbcSeed {options.seed % 2**31}"],
    )
    model.solve(solver)
    if pulp.LpStatusInfeasible in (model.status, model.sol_status):
        return MilpResult("infeasible", None, None)
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return MilpResult("unknown", None, None)
    objective = float(pulp.value(model.objective))
    optimal = model.sol_status == pulp.LpSolutionOptimal
    return MilpResult("optimal" if optimal else "feasible", objective, objective if optimal else None)
