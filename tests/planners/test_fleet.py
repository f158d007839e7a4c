"""Fleet sizing: equal to brute force, sound, explained; invariants F-1 to F-4."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from concertina.errors import OperatorError
from concertina.planners.fleet import FleetKind, FleetPlan, FleetProblem, Forecast, ServiceTarget
from concertina.planners.fleet_solve import check_fleet, fleet_cost, plan_fleet
from concertina.planners.milp import MilpOptions
from hypothesis import given, settings
from hypothesis import strategies as st

FAST = FleetKind("fast", (10.0, 4.0), 3.0, max_count=3)
SLOW = FleetKind("slow", (4.0, 3.0), 1.0, max_count=3)


def make(kinds: tuple[FleetKind, ...], demand_TR: list[tuple[float, float]], **more: object) -> FleetProblem:
    forecasts = tuple(Forecast.certain([row[r] for row in demand_TR]) for r in range(2))
    targets = (ServiceTarget("prefill"), ServiceTarget("decode", max_utilisation=0.8))
    return FleetProblem(10.0, ("prefill", "decode"), kinds, forecasts, targets, **more)  # type: ignore[arg-type]


def brute_force(problem: FleetProblem) -> float | None:
    """Least cost over every sequence of orders and returns, judged by the independent check."""
    options_K = []
    for kind in problem.kinds:
        orders = range(kind.max_count + 1)
        options = []
        for started in itertools.product(orders, repeat=problem.periods):
            for stopped in itertools.product(orders, repeat=problem.periods):
                options.append((started, stopped, serving(kind, started, stopped)))
        alone = replace(problem, kinds=(kind,), targets=())
        options_K.append(
            [o for o in options if not check_fleet(alone, FleetPlan("feasible", (o[2],), (o[0],), (o[1],)))]
        )
    best = None
    for choice in itertools.product(*options_K):
        plan = FleetPlan(
            "feasible", tuple(c[2] for c in choice), tuple(c[0] for c in choice), tuple(c[1] for c in choice)
        )
        if check_fleet(problem, plan):
            continue
        cost = fleet_cost(problem, plan).total
        best = cost if best is None else min(best, cost)
    return best


def serving(kind: FleetKind, started: tuple[int, ...], stopped: tuple[int, ...]) -> tuple[int, ...]:
    now, result = kind.running, []
    for t in range(len(started)):
        now += kind.arriving_at(t) - stopped[t]
        now += started[t - kind.start_periods] if t >= kind.start_periods else 0
        result.append(now)
    return tuple(result)


kinds = st.builds(
    FleetKind,
    st.just("x"),
    st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda c: (float(c[0]), float(c[1]))),
    st.integers(1, 5).map(float),
    running=st.integers(0, 2),
    max_count=st.just(2),
    start_cost=st.integers(0, 40).map(float),
    stop_cost=st.integers(0, 20).map(float),
    start_periods=st.integers(0, 1),
)
kind_pairs = st.tuples(kinds, kinds).map(lambda pair: (replace(pair[0], name="a"), replace(pair[1], name="b")))
demands = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), min_size=2, max_size=2).map(
    lambda rows: [(float(a), float(b)) for a, b in rows]
)


@settings(max_examples=25, deadline=None)
@given(kind_pairs, demands, st.sampled_from(["highs", "cbc"]))
def test_equals_brute_force(pair: tuple[FleetKind, ...], demand_TR: list[tuple[float, float]], backend: str) -> None:
    """F-1: the plan costs what the cheapest of all plans costs, or there is none; the check accepts it."""
    problem = make(pair, demand_TR)
    plan = plan_fleet(problem, MilpOptions(backend=backend))  # type: ignore[arg-type]
    best = brute_force(problem)
    if best is None:
        assert plan.status == "infeasible"
        assert plan.shortages
    else:
        assert plan.status == "optimal"
        assert plan.cost is not None
        assert plan.bound is not None
        assert plan.cost.total == pytest.approx(best)
        assert plan.bound <= plan.cost.total * (1 + 1e-6) + 1e-6
        assert check_fleet(problem, plan) == []
        assert len({(r.kind, t) for r in plan.reasons for t in range(r.first, r.last + 1)}) == 4


@settings(max_examples=25, deadline=None)
@given(kind_pairs, demands, st.integers(0, 1), st.integers(1, 8))
def test_more_demand_never_costs_less(
    pair: tuple[FleetKind, ...], demand_TR: list[tuple[float, float]], t: int, more: int
) -> None:
    """F-2: raising any demand never lowers the cost, and never makes an infeasible problem feasible."""
    higher = [(a + (more if i == t else 0), b) for i, (a, b) in enumerate(demand_TR)]
    low, high = plan_fleet(make(pair, demand_TR)), plan_fleet(make(pair, higher))
    if low.status == "infeasible":
        assert high.status == "infeasible"
    elif high.cost is not None:
        assert low.cost is not None
        assert high.cost.total >= low.cost.total - 1e-6


@settings(max_examples=25, deadline=None)
@given(kind_pairs, demands)
def test_one_more_allowed_device_never_costs_more(
    pair: tuple[FleetKind, ...], demand_TR: list[tuple[float, float]]
) -> None:
    """F-3: loosening a limit never raises the cost; the same input gives the same plan."""
    plan = plan_fleet(make(pair, demand_TR))
    looser = plan_fleet(make((replace(pair[0], max_count=3), pair[1]), demand_TR))
    assert plan == plan_fleet(make(pair, demand_TR))
    if plan.cost is not None:
        assert looser.cost is not None
        assert looser.cost.total <= plan.cost.total + 1e-6


@settings(max_examples=25, deadline=None)
@given(kind_pairs, demands, st.integers(1, 50))
def test_a_shortfall_price_always_gives_a_plan(
    pair: tuple[FleetKind, ...], demand_TR: list[tuple[float, float]], price: int
) -> None:
    """F-4: with a price on shortfall every problem has a plan, at most as dear as the one without shortfall."""
    hard = plan_fleet(make(pair, demand_TR))
    soft_problem = make(pair, demand_TR, shortfall_price=float(price))
    soft = plan_fleet(soft_problem)
    assert soft.status == "optimal"
    assert check_fleet(soft_problem, soft) == []
    if hard.cost is not None:
        assert soft.cost is not None
        assert soft.cost.total <= hard.cost.total + 1e-6


def test_orders_ahead_of_a_peak_and_says_why() -> None:
    kind = FleetKind("gpu", (10.0, 10.0), 1.0, running=1, start_periods=2)
    plan = plan_fleet(make((kind,), [(5, 5), (5, 5), (30, 5), (5, 5)]))
    assert plan.serving_KT == ((1, 1, 3, 1),)
    assert plan.started_KT == ((2, 0, 0, 0),)
    peak = next(r for r in plan.reasons if r.first == 2)
    assert "prefill: needs 30" in peak.text
    assert "with one less 20" in peak.text


def test_keeps_devices_between_peaks_when_switching_costs_more() -> None:
    demand = [(20.0, 1.0), (5.0, 1.0), (20.0, 1.0)]
    cheap = plan_fleet(make((FleetKind("gpu", (10.0, 10.0), 1.0, running=2),), demand))
    dear = plan_fleet(make((FleetKind("gpu", (10.0, 10.0), 1.0, running=2, start_cost=50.0),), demand))
    assert cheap.serving_KT == ((2, 1, 2),)
    assert dear.serving_KT == ((2, 2, 2),)
    assert "kept for period 2" in next(r for r in dear.reasons if r.first == 1).text


def test_quantiles_are_interpolated_and_utilisation_kept() -> None:
    forecast = Forecast((0.5, 0.9), ((10.0, 50.0),))
    assert forecast.at(0.7) == (pytest.approx(30.0),)
    problem = FleetProblem(
        1.0, ("r",), (FleetKind("k", (10.0,), 1.0),), (forecast,), (ServiceTarget("r", 0.7, max_utilisation=0.5),)
    )
    assert plan_fleet(problem).serving_KT == ((6,),)


def test_infeasible_names_the_target_the_period_and_the_lack() -> None:
    plan = plan_fleet(make((FAST, SLOW), [(10.0, 1.0), (60.0, 1.0)]))
    assert plan.status == "infeasible"
    assert [(s.resource, s.period) for s in plan.shortages] == [("prefill", 1)]
    assert plan.shortages[0].lack == pytest.approx(60 - 3 * 10 - 3 * 4)
    assert "period 1: prefill: needs 60, at most 42 can be there (18 too little)" in str(plan.shortages[0])


def test_check_finds_a_wrong_plan() -> None:
    problem = make((FAST, SLOW), [(10.0, 1.0), (20.0, 1.0)])
    plan = plan_fleet(problem)
    fewer = replace(plan, serving_KT=tuple(tuple(max(0, n - 1) for n in row) for row in plan.serving_KT))
    assert any("too little" in w for w in check_fleet(problem, fewer))
    assert any("the orders make" in w for w in check_fleet(problem, fewer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"period_s": 0.0}, "period_s: 0.0; expected a number above 0"),
        ({"kinds": ()}, "kinds: (); expected at least one"),
        ({"kinds": (FAST, FAST)}, "kinds: ['fast', 'fast']; expected distinct names"),
        ({"kinds": (replace(FAST, capacity_R=(1.0,)),)}, r"kinds[fast].capacity: (1.0,); expected 2 finite"),
        ({"kinds": (replace(FAST, price_per_s=-1.0),)}, "kinds[fast].price_per_s: -1.0; expected at least 0"),
        ({"kinds": (replace(FAST, min_count=4),)}, "kinds[fast].max_count: 3; expected at least 4"),
        ({"kinds": (replace(FAST, arriving=(0, 4)),)}, "still starting 4"),
        ({"targets": (ServiceTarget("speed"),)}, "targets[0].resource: 'speed'; expected one of prefill, decode"),
        ({"targets": (ServiceTarget("decode", max_utilisation=1.5),)}, "targets[0].max_utilisation: 1.5"),
        ({"forecasts": (Forecast.certain([1.0]),)}, "forecasts: 1; expected one for each of 2 resources"),
        ({"forecasts": (Forecast.certain([1.0]), Forecast.certain([1.0, 2.0]))}, "forecasts[decode]: '2 periods'"),
        ({"forecasts": (Forecast((0.5, 0.9), ((2.0, 1.0),)),) * 2}, "forecasts[prefill].demand[0]: (2.0, 1.0)"),
        ({"forecasts": (Forecast((0.5, 0.9), ((1.0, 2.0),)),) * 2}, "targets[0].quantile: 0.95; expected within"),
        ({"shortfall_price": 0.0}, "shortfall_price: 0.0; expected null or a number above 0"),
    ],
)
def test_bad_problems_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(OperatorError) as caught:
        replace(make((FAST, SLOW), [(1.0, 1.0)]), **change)
    assert message in str(caught.value)
