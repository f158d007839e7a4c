"""The solvers' door tells the truth: proved, stopped with or without an incumbent, infeasible."""

from __future__ import annotations

import random
from typing import Any

import pulp
import pytest
from concertina.planners.milp import Backend, MilpOptions, solve_milp

BACKENDS: tuple[Backend, ...] = ("highs", "cbc")


def partition(count: int, machines: int, seed: int = 1) -> tuple[Any, list[list[Any]], Any, list[int]]:
    """Jobs on machines, least makespan, plus a constant of 5 in the objective."""
    rng = random.Random(seed)
    weights = [rng.randint(10, 1000) for _ in range(count)]
    model = pulp.LpProblem("partition", pulp.LpMinimize)
    x = [[pulp.LpVariable(f"x{i}_{j}", cat="Binary") for j in range(machines)] for i in range(count)]
    top = pulp.LpVariable("top", 0)
    model += top + 5
    for row in x:
        model += pulp.lpSum(row) == 1
    for j in range(machines):
        model += pulp.lpSum(weights[i] * x[i][j] for i in range(count)) <= top
    return model, x, top, weights


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_proved_optimum_has_its_constant_and_bound(backend: Backend) -> None:
    model, _, _, weights = partition(8, 2)
    result = solve_milp(model, MilpOptions(backend=backend))
    sums = {sum(w for i, w in enumerate(weights) if mask >> i & 1) for mask in range(256)}
    best = min(max(s, sum(weights) - s) for s in sums)
    assert result.status == "optimal"
    assert result.objective == pytest.approx(best + 5)
    assert result.bound == pytest.approx(best + 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infeasible_is_said(backend: Backend) -> None:
    model = pulp.LpProblem("odd", pulp.LpMinimize)
    x = pulp.LpVariable("x", 0, 3, cat="Integer")
    model += x
    model += 2 * x == 3
    assert solve_milp(model, MilpOptions(backend=backend)).status == "infeasible"


@pytest.mark.parametrize("backend", BACKENDS)
def test_stopped_without_an_incumbent_has_no_objective(backend: Backend) -> None:
    model, *_ = partition(100, 27)
    result = solve_milp(model, MilpOptions(time_limit_s=1e-4, backend=backend))
    assert result.status == "unknown"
    assert not result.found


def test_a_node_limit_keeps_the_warm_start_and_a_bound() -> None:
    model, x, top, weights = partition(40, 7)
    for i, row in enumerate(x):
        for j, variable in enumerate(row):
            variable.setInitialValue(float(i % 7 == j))
    start = max(sum(weights[j::7]) for j in range(7))
    top.setInitialValue(start)
    options = MilpOptions(node_limit=1, warm_start=True)
    result = solve_milp(model, options)
    assert result.status == "feasible"
    assert result.objective is not None
    assert result.bound is not None
    assert result.bound < result.objective <= start + 5
    again, x, top, _ = partition(40, 7)
    for i, row in enumerate(x):
        for j, variable in enumerate(row):
            variable.setInitialValue(float(i % 7 == j))
    top.setInitialValue(start)
    assert solve_milp(again, options) == result


def test_maximising_and_missing_solvers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected a minimisation"):
        solve_milp(pulp.LpProblem("max", pulp.LpMaximize))
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    with pytest.raises(ValueError, match="highspy is not installed"):
        solve_milp(pulp.LpProblem("min", pulp.LpMinimize), MilpOptions(backend="highs"))
    model, *_ = partition(6, 2)
    assert solve_milp(model).status == "optimal", "CBC is the fall-back"
