r"""The fleet as an integer program, its independent check, and the reasons for its counts.

For kind k and period t, with whole numbers n (serving), u (ordered), v (given back), a (arriving anyway), delay L_k:

    n[k,t] = n[k,t-1] + a[k,t] + u[k,t-L_k] - v[k,t]                                      (F1)
    m[k,t] = n[k,t] + sum_{t-L_k < i <= t} u[k,i] + sum_{i > t} a[k,i],  min <= m <= max   (F2)
    sum_k capacity[k,r] n[k,t] + z[g,t] >= needed[g,t]   for every target g of resource r  (F3)
    minimise  sum_t period_s (sum_k price[k] m[k,t] + shortfall_price sum_g z[g,t])
              + sum_{k,t} (start_cost[k] u[k,t] + stop_cost[k] v[k,t])                      (F4)

Without a shortfall price z is 0. An infeasible problem is solved again with the least total z, relative to what is
needed, which names the targets that cannot be met and by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pulp as _pulp

from .fleet import FleetCost, FleetKind, FleetPlan, FleetProblem, FleetReason, Shortage
from .milp import MilpOptions, solve_milp

pulp: Any = _pulp
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class _Program:
    model: Any
    serving_KT: list[list[Any]]
    started_KT: list[list[Any]]
    stopped_KT: list[list[Any]]
    short_GT: list[list[Any]]


def plan_fleet(problem: FleetProblem, options: MilpOptions | None = None) -> FleetPlan:
    """The cheapest fleet that meets the targets over the horizon.

    Examples
    --------
    >>> from concertina.planners.fleet import FleetKind, FleetProblem, Forecast, ServiceTarget
    >>> kind = FleetKind("gpu", (100.0,), price_per_s=1.0)
    >>> problem = FleetProblem(60.0, ("tokens",), (kind,), (Forecast.certain([250.0]),), (ServiceTarget("tokens"),))
    >>> plan_fleet(problem).serving_KT
    ((3,),)
    """
    program = _build(problem, least_shortfall=False)
    result = solve_milp(program.model, options)
    if result.status == "infeasible":
        return FleetPlan("infeasible", shortages=_shortages(problem, options))
    if not result.found:
        return FleetPlan("unknown", bound=result.bound)
    plan = FleetPlan(
        "optimal" if result.status == "optimal" else "feasible",
        _whole(program.serving_KT),
        _whole(program.started_KT),
        _whole(program.stopped_KT),
        bound=result.bound,
    )
    plan = replace(plan, cost=fleet_cost(problem, plan))
    return replace(plan, reasons=_reasons(problem, plan))


def fleet_cost(problem: FleetProblem, plan: FleetPlan) -> FleetCost:
    """The cost (F4) of a plan, by term."""
    running = starting = stopping = 0.0
    for k, kind in enumerate(problem.kinds):
        paid_T = _paid(kind, plan.serving_KT[k], plan.started_KT[k])
        running += kind.price_per_s * problem.period_s * sum(paid_T)
        starting += kind.start_cost * sum(plan.started_KT[k])
        stopping += kind.stop_cost * sum(plan.stopped_KT[k])
    short = sum(lack for _, _, lack in _lacks(problem, plan))
    return FleetCost(running, starting, stopping, (problem.shortfall_price or 0.0) * problem.period_s * short)


def check_fleet(problem: FleetProblem, plan: FleetPlan) -> list[str]:
    """What is wrong with a plan that has counts: broken rules (F1-F3), empty when it is sound."""
    wrong = []
    for k, kind in enumerate(problem.kinds):
        serving_T, started_T, stopped_T = plan.serving_KT[k], plan.started_KT[k], plan.stopped_KT[k]
        before = kind.running
        for t in range(problem.periods):
            ordered = started_T[t - kind.start_periods] if t >= kind.start_periods else 0
            now = before + kind.arriving_at(t) + ordered - stopped_T[t]
            if serving_T[t] != now or min(serving_T[t], started_T[t], stopped_T[t]) < 0:
                wrong.append(f"{kind.name}, period {t}: {serving_T[t]} serve, the orders make {now}")
            before = serving_T[t]
        for t, paid in enumerate(_paid(kind, serving_T, started_T)):
            if not kind.min_count <= paid <= kind.max_count:
                wrong.append(f"{kind.name}, period {t}: {paid} paid for, allowed {kind.min_count}..{kind.max_count}")
    if problem.shortfall_price is None:
        for resource, t, lack in _lacks(problem, plan):
            wrong.append(f"{resource}, period {t}: {lack:g} too little")
    return wrong


def _build(problem: FleetProblem, least_shortfall: bool) -> _Program:
    model = pulp.LpProblem("fleet", pulp.LpMinimize)
    K, T, G = range(len(problem.kinds)), range(problem.periods), range(len(problem.targets))
    serving_KT, started_KT, stopped_KT = (
        [[pulp.LpVariable(f"{name}_{k}_{t}", 0, cat="Integer") for t in T] for k in K] for name in "nuv"
    )
    soft = least_shortfall or problem.shortfall_price is not None
    short_GT = [[pulp.LpVariable(f"z_{g}_{t}", 0) if soft else 0 for t in T] for g in G]
    program = _Program(model, serving_KT, started_KT, stopped_KT, short_GT)
    cost = pulp.LpAffineExpression()
    for k in K:
        cost += _add_kind(problem, program, k)
    for g in G:
        _add_target(problem, program, g)
    if least_shortfall:
        needed_GT = [problem.needed(target) for target in problem.targets]
        cost = pulp.lpSum(short_GT[g][t] / (needed_GT[g][t] or 1.0) for g in G for t in T)
    elif soft:
        price = (problem.shortfall_price or 0.0) * problem.period_s
        cost += pulp.lpSum(price * z for row in short_GT for z in row)
    model.setObjective(cost)
    return program


def _add_kind(problem: FleetProblem, program: _Program, k: int) -> Any:
    """Constraints (F1) and (F2) of one kind; returns its part of the cost (F4)."""
    kind, model = problem.kinds[k], program.model
    n_T, u_T, v_T = program.serving_KT[k], program.started_KT[k], program.stopped_KT[k]
    for t in range(problem.periods):
        before = n_T[t - 1] if t else kind.running
        ordered = u_T[t - kind.start_periods] if t >= kind.start_periods else 0
        model += n_T[t] == before + kind.arriving_at(t) + ordered - v_T[t]
    paid_T = _paid(kind, n_T, u_T)
    for paid in paid_T:
        model += paid >= kind.min_count
        model += paid <= kind.max_count
    return (
        kind.price_per_s * problem.period_s * pulp.lpSum(paid_T)
        + kind.start_cost * pulp.lpSum(u_T)
        + kind.stop_cost * pulp.lpSum(v_T)
    )


def _add_target(problem: FleetProblem, program: _Program, g: int) -> None:
    """Constraint (F3), divided by what is needed so that the solver's tolerances are relative."""
    target, model = problem.targets[g], program.model
    r = problem.resources.index(target.resource)
    for t, needed in enumerate(problem.needed(target)):
        if needed > 0:
            have = pulp.lpSum(
                (kind.capacity_R[r] / needed) * program.serving_KT[k][t] for k, kind in enumerate(problem.kinds)
            )
            model += have + program.short_GT[g][t] / needed >= 1


def _paid(kind: FleetKind, serving_T: Sequence[Any], started_T: Sequence[Any]) -> list[Any]:
    """Devices paid for in each period (F2), from numbers or from variables."""
    paid_T = []
    for t, serving in enumerate(serving_T):
        paid = serving + kind.arriving_after(t)
        for ordered in started_T[max(0, t - kind.start_periods + 1) : t + 1] if kind.start_periods else []:
            paid = paid + ordered
        paid_T.append(paid)
    return paid_T


def _whole(values_KT: list[list[Any]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(round(v.varValue) for v in values_T) for values_T in values_KT)


def _capacity(problem: FleetProblem, plan: FleetPlan, resource: str, t: int) -> float:
    r = problem.resources.index(resource)
    return sum(kind.capacity_R[r] * plan.serving_KT[k][t] for k, kind in enumerate(problem.kinds))


def _lacks(problem: FleetProblem, plan: FleetPlan) -> list[tuple[str, int, float]]:
    """(resource, period, units too little), for each target that is not met."""
    lacks = []
    for target in problem.targets:
        for t, needed in enumerate(problem.needed(target)):
            lack = needed - _capacity(problem, plan, target.resource, t)
            if lack > _TOLERANCE * max(1.0, needed):
                lacks.append((target.resource, t, lack))
    return lacks


def _shortages(problem: FleetProblem, options: MilpOptions | None) -> tuple[Shortage, ...]:
    program = _build(problem, least_shortfall=True)
    if not solve_milp(program.model, options).found:
        return ()
    shortages = []
    for g, target in enumerate(problem.targets):
        for t, needed in enumerate(problem.needed(target)):
            lack = float(program.short_GT[g][t].varValue or 0.0)
            if lack > _TOLERANCE * max(1.0, needed):
                shortages.append(Shortage(target.resource, t, needed, lack))
    return tuple(shortages)


def _reasons(problem: FleetProblem, plan: FleetPlan) -> tuple[FleetReason, ...]:
    reasons: list[FleetReason] = []
    for k, kind in enumerate(problem.kinds):
        for t in range(problem.periods):
            new = FleetReason(kind.name, t, t, plan.serving_KT[k][t], _why(problem, plan, k, t))
            last = reasons[-1] if reasons else None
            if last and (last.kind, last.count, last.text) == (new.kind, new.count, new.text):
                reasons[-1] = replace(last, last=t)
            else:
                reasons.append(new)
    return tuple(reasons)


def _why(problem: FleetProblem, plan: FleetPlan, k: int, t: int) -> str:
    """Which constraint keeps kind ``k`` from having one device less in period ``t``."""
    kind = problem.kinds[k]
    if plan.serving_KT[k][t] == 0:
        return "none needed: the others cover the demand at less cost, or there is none"
    binding = _binding_target(problem, plan, k, t)
    if binding:
        return binding
    if _paid(kind, plan.serving_KT[k], plan.started_KT[k])[t] <= kind.min_count:
        return f"the minimum count is {kind.min_count}"
    for later in range(t + 1, problem.periods):
        if plan.stopped_KT[k][later] > 0:
            break
        if _binding_target(problem, plan, k, later):
            return f"kept for period {later}: giving back and ordering again would cost more or come too late"
    if kind.stop_cost > 0:
        return f"giving one back costs {kind.stop_cost:g}, more than keeping it saves within the horizon"
    return "cheaper together with the other kinds' counts than any other mixture"


def _binding_target(problem: FleetProblem, plan: FleetPlan, k: int, t: int) -> str | None:
    for target in problem.targets:
        r = problem.resources.index(target.resource)
        needed, have = problem.needed(target)[t], _capacity(problem, plan, target.resource, t)
        capacity = problem.kinds[k].capacity_R[r]
        if capacity > 0 and have - capacity < needed * (1 - _TOLERANCE):
            return (
                f"{target.resource}: needs {needed:g} (demand at quantile {target.quantile:g}, at most "
                f"{target.max_utilisation:.0%} used), has {have:g}; with one less {have - capacity:g}"
            )
    return None
