"""Solvers: equal to brute force on small instances, sound on every instance; invariants P-1 to P-6."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from concertina.planners import scalable
from concertina.planners.bounds import case_bound
from concertina.planners.check import check, check_placement
from concertina.planners.cost import evaluate
from concertina.planners.layer_search import LayerSearch
from concertina.planners.params import Params
from concertina.planners.placement import Placement
from concertina.planners.problem import Objective, Options, Pair, PlacementProblem, Regime
from concertina.planners.solution import Infeasible, Progress, Solution, StoppingRule
from concertina.planners.solve import METHODS, solve
from concertina.planners.units import layer_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from .instances import best_by_force, problem, relabelled, single

QUICK = StoppingRule(time_limit_s=20.0, gap=1e-6, iterations=20)
SLOW_OK = settings(max_examples=15, deadline=None)


def solved(p: PlacementProblem, method: str = "auto", **arguments: Any) -> Solution:
    answer = solve(p, method, stop=arguments.pop("stop", QUICK), **arguments)
    assert isinstance(answer, Solution), str(answer)
    return answer


@st.composite
def tiny(draw: st.DrawFn) -> PlacementProblem:
    """One layer, up to 4 experts on up to 3 devices of any speed."""
    experts, devices = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    tokens = draw(st.lists(st.integers(0, 9), min_size=experts, max_size=experts))
    speeds = draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=devices, max_size=devices))
    slots = draw(st.lists(st.integers(0, 3), min_size=devices, max_size=devices).filter(lambda s: sum(s) >= experts))
    return problem(np.array([tokens], float), speeds, slots, expert_bytes=draw(st.sampled_from([0.01, 1.0, 4.0])))


@st.composite
def ruled(draw: st.DrawFn) -> PlacementProblem:
    """Two layers with rules, scenarios and prices drawn at random; often feasible."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    experts, devices = draw(st.integers(2, 8)), draw(st.integers(2, 5))
    scenarios = draw(st.integers(1, 3))
    tokens = rng.lognormal(0, 1, (scenarios, 2, experts)).round(2)
    options = Options(
        min_nodes=draw(st.sampled_from([1, 1, 2])),
        pinned=(Pair(0, "d1"),) if draw(st.booleans()) else (),
        forbidden=(Pair(1, "d0", 1),) if draw(st.booleans()) else (),
        groups=((0, 1),) if draw(st.booleans()) else (),
    )
    return problem(
        tokens,
        rng.choice([0.5, 1.0, 1.5], devices).tolist(),
        rng.integers(experts // devices + 1, experts + 2, devices),
        expert_bytes=rng.uniform(0.1, 2.0, (2, experts)).round(2) if draw(st.booleans()) else 0.7,
        nodes=2,
        options=options,
        objective=Objective(
            (Regime("decode", 3.0, 1.0), Regime("prefill", 1.0, 4.0)) if draw(st.booleans()) else (Regime(),),
            draw(st.sampled_from([0.0, 0.6])),
            draw(st.sampled_from(["fixed", "per_batch"])),
        ),
        current=single(tuple(f"d{i}" for i in range(devices)), rng.integers(0, devices, (2, experts)).tolist()),
        price=draw(st.sampled_from([0.0, 0.1])),
        hidden_bytes=draw(st.sampled_from([0.0, 0.3])),
    )


@SLOW_OK
@given(tiny())
def test_exact_equals_brute_force_and_bounds_hold(p: PlacementProblem) -> None:
    """P-1: the exact method finds the optimum; P-2: no bound is above it."""
    best = best_by_force(p)
    if np.isinf(best):
        assert isinstance(solve(p, "ilp", stop=QUICK), Infeasible)
        return
    exact = solved(p, "ilp")
    assert exact.cost.total == pytest.approx(best, rel=1e-5)
    assert exact.gap <= 1e-5
    assert exact.reason == "optimal"
    layer = layer_problem(p, 0)
    assert case_bound(layer, layer.tokens_U, layer.base_D) <= best * (1 + 1e-9)
    quick = solved(p, "scalable")
    assert quick.bound * (1 - 1e-9) <= best <= quick.cost.total * (1 + 1e-9)


@SLOW_OK
@given(ruled())
def test_every_answer_passes_the_checker(p: PlacementProblem) -> None:
    """P-3: rules kept, cost recounted, bound at most the cost; two methods never contradict each other."""
    quick = StoppingRule(time_limit_s=1.5, gap=1e-4, iterations=6)
    answers = [solve(p, method, stop=quick) for method in ("scalable", "ilp")]
    for answer in answers:
        if isinstance(answer, Solution):
            assert check(p, answer) == []
    costs = [a.cost.total for a in answers if isinstance(a, Solution)]
    bounds = [a.bound for a in answers if isinstance(a, Solution)]
    if costs:
        assert max(bounds) <= min(costs) * (1 + 1e-6)
        assert not any(isinstance(a, Infeasible) and a.proven for a in answers)


def skewed(layers: int, experts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 0.8, (layers, experts)) * 10


def test_same_seed_same_plan() -> None:
    """P-4."""
    p = problem(skewed(3, 24), [1.0, 1.0, 0.5, 2.0], [8, 7, 7, 6], expert_bytes=2.0)
    first, second = (solved(p, "scalable", params=Params(seed=3)) for _ in range(2))
    assert first.placement == second.placement
    assert first.bound == second.bound


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(6)), st.permutations(range(3)))
def test_relabelling_changes_nothing_but_names(experts: list[int], devices: list[int]) -> None:
    """P-5: the optimum, every cost and every bound are the same under other names."""
    tokens, speeds, slots = skewed(1, 6), [1.0, 0.5, 2.0], [3, 2, 3]
    p = problem(tokens, speeds, slots)
    q = problem(tokens[:, experts], [speeds[d] for d in devices], [slots[d] for d in devices])
    a, b = solved(p, "ilp"), solved(q, "ilp")
    assert a.cost.total == pytest.approx(b.cost.total, rel=1e-5)
    layer_p, layer_q = layer_problem(p, 0), layer_problem(q, 0)
    same = case_bound(layer_q, layer_q.tokens_U, layer_q.base_D)
    assert case_bound(layer_p, layer_p.tokens_U, layer_p.base_D) == pytest.approx(same, rel=1e-6)
    renamed = relabelled(a.placement, experts)
    only_experts = problem(tokens[:, experts], speeds, slots)
    assert evaluate(only_experts, renamed).total == pytest.approx(a.cost.total, rel=1e-12)


@settings(max_examples=10, deadline=None)
@given(tiny(), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 2))
def test_more_devices_or_slots_never_cost_more(p: PlacementProblem, speed: float, slots: int) -> None:
    """P-6: the optimum never gets worse with another device, or with more room on those there are."""
    if isinstance(solve(p, "ilp", stop=QUICK), Infeasible):
        return
    before = solved(p, "ilp").cost.total
    tokens, speeds = p.loads.tokens_SLE[0], [d.flops for d in p.cluster.devices]
    size = float(p.model.bytes_LE[0, 0])
    had = p.slots_LD[0].tolist()
    for q in (
        problem(tokens, [*speeds, speed], [*had, slots], expert_bytes=size),
        problem(tokens, speeds, [s + slots for s in had], expert_bytes=size),
    ):
        assert solved(q, "ilp").cost.total <= before * (1 + 1e-5)


def test_doubling_loads_doubles_token_terms_only() -> None:
    """Eq. 4, 5: token work, communication and their bounds are linear in the loads; reading weights is not."""
    tokens = skewed(2, 8)
    pairs = np.random.default_rng(1).random((1, 8, 8))
    for given_pairs in (None, pairs):
        one, two = (
            problem(tokens * k, [1.0, 0.5, 2.0], 4, expert_bytes=3.0, nodes=2, hidden_bytes=0.5, pairs=given_pairs)
            for k in (1, 2)
        )
        placement = solved(one, "scalable").placement
        a, b = evaluate(one, placement), evaluate(two, placement)
        np.testing.assert_allclose(b.read_LD, a.read_LD)
        np.testing.assert_allclose(b.device_LD - b.read_LD, 2 * (a.device_LD - a.read_LD))
        np.testing.assert_allclose(b.node_L + b.cluster_L, 2 * (a.node_L + a.cluster_L))
    weightless = [problem(tokens * k, [1.0, 0.5, 2.0], 4, expert_bytes=1e-12) for k in (1, 2)]
    costs = [solved(p, "scalable") for p in weightless]
    assert costs[1].cost.total == pytest.approx(2 * costs[0].cost.total, rel=1e-6)
    assert costs[1].bound == pytest.approx(2 * costs[0].bound, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_and_is_sound(method: str) -> None:
    p = problem(skewed(2, 6), [1.0] * 4, 2, expert_bytes=1.5, nodes=2)
    answer = solved(p, method, stop=StoppingRule(3.0, 1e-2, 10))
    assert check(p, answer) == [] or method.startswith(("eplb", "greedy", "round"))
    assert answer.bound <= answer.cost.total * (1 + 1e-9)
    if not method.startswith("auto"):
        assert answer.method == method


def test_ours_is_never_worse_than_a_baseline() -> None:
    for seed, slots in ((1, 6), (2, 8), (3, 12)):
        p = problem(skewed(1, 32, seed), [1.0] * 6, slots, expert_bytes=3.0)
        ours = solved(p, "scalable").cost.total
        for name in ("round_robin", "greedy", "eplb_global", "eplb_hierarchical"):
            assert ours <= solved(p, name).cost.total * (1 + 1e-9)


def test_groups_stay_together_and_idle_replicas_are_not_read() -> None:
    p = problem(skewed(1, 6), [1.0, 1.0], [6, 6], expert_bytes=50.0, options=Options(groups=((0, 3, 5),)))
    answer = solved(p, "scalable")
    assert check(p, answer) == []
    assert all(len(replicas) == 1 for replicas in answer.placement.replicas_LE[0])


def test_joint_keeps_affine_experts_together() -> None:
    """Eq. 5: with strong affinity and balanced loads, neighbours in the chain share a device."""
    tokens = np.full((3, 4), 10.0)
    pairs = np.stack([np.roll(np.eye(4), shift, axis=1) for shift in (1, 2)])
    p = problem(tokens, [1.0, 1.0], 2, expert_bytes=0.1, nodes=2, pairs=pairs, hidden_bytes=5.0)
    joint = solved(p, "joint", stop=StoppingRule(20.0, 1e-6, 10))
    assert check(p, joint) == []
    assert joint.reason == "optimal"
    assert joint.cost.node_L[1:].sum() == joint.cost.cluster_L[1:].sum() == pytest.approx(0.0, abs=1e-9)
    assert joint.cost.total <= solved(p, "scalable").cost.total * (1 + 1e-9)


def test_moves_are_paid_for() -> None:
    """Eq. 9: a high price keeps the current placement, none lets it go."""
    tokens = np.array([[9.0, 8.0, 1.0, 1.0]])
    now = single(("d0", "d1"), [[0, 0, 1, 1]])
    free, dear = (problem(tokens, [1.0, 1.0], 2, expert_bytes=1.0, current=now, price=p) for p in (0.0, 100.0))
    assert solved(free, "ilp").cost.step_L.sum() == pytest.approx(12.0)
    stay = solved(dear, "ilp")
    assert stay.cost.moves == 0.0
    assert stay.cost.step_L.sum() == pytest.approx(19.0)


LACKS = [
    (problem(np.ones((1, 5)), [1.0, 1.0], 2), "replicas on all devices: needs 5 slots, has 4 (1 short)"),
    (
        problem(np.ones((1, 2)), [1.0, 1.0], 2, options=Options(min_nodes=2)),
        "layer 0: min_nodes: needs 2 nodes, has 1 (1 short)",
    ),
    (
        problem(np.ones((1, 2)), [1.0, 1.0], 2, options=Options(pinned=(Pair(0, "d0"),), forbidden=(Pair(0, "d0"),))),
        "pinned to and forbidden on device 0",
    ),
    (
        problem(np.ones((1, 2)), [1.0], 2, options=Options(forbidden=(Pair(1, "d0"),))),
        "experts [1]: nodes that may and can hold them: needs 1 nodes, has 0",
    ),
    (
        problem(np.ones((1, 4)), [1.0, 1.0], [1, 3], options=Options(pinned=(Pair(0, "d0"), Pair(1, "d0")))),
        "device 0: pinned replicas: needs 2 slots, has 1",
    ),
]


@pytest.mark.parametrize(("p", "words"), LACKS, ids=[w for _, w in LACKS])
@pytest.mark.parametrize("method", ["scalable", "ilp", "greedy"])
def test_infeasible_is_an_answer_that_names_what_is_short(p: PlacementProblem, words: str, method: str) -> None:
    answer = solve(p, method, stop=QUICK)
    assert isinstance(answer, Infeasible)
    assert answer.proven
    assert words in str(answer)


def test_infeasible_by_rules_together_is_proved_by_the_program() -> None:
    """Two groups of two fit no device but by splitting slots: only the program can tell."""
    p = problem(np.ones((1, 4)), [1.0, 1.0], [3, 1], options=Options(groups=((0, 1), (2, 3))))
    answer = solve(p, "ilp", stop=QUICK)
    assert isinstance(answer, Infeasible)
    assert answer.proven


def test_time_limit_and_progress() -> None:
    ticks = iter(range(10**6))
    seen: list[Progress] = []
    stop = StoppingRule(time_limit_s=30.0, gap=0.0, iterations=10**6, now=lambda: float(next(ticks)))
    p = problem(skewed(2, 24), [1.0, 0.7, 0.4], 12, expert_bytes=2.0)
    answer = solved(p, "scalable", stop=stop, progress=seen.append)
    assert answer.reason == "time limit"
    assert next(ticks) < 200
    assert [s.cost for s in seen[1:]] == sorted((s.cost for s in seen[1:]), reverse=True)


def test_time_spent_on_bounds_counts_into_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the making of searches, which computes the bounds, moves on: no time is left after it."""
    clock = [0.0]
    pieces: list[int] = []

    def slow_search(*args: Any) -> LayerSearch:
        clock[0] += 10.0
        return LayerSearch(*args)

    monkeypatch.setattr(scalable, "LayerSearch", slow_search)
    stop = StoppingRule(time_limit_s=15.0, gap=0.0, iterations=3, now=lambda: clock[0])
    p = problem(skewed(2, 24), [1.0, 0.7, 0.4], 12, expert_bytes=2.0)
    answer = solved(p, "scalable", stop=stop, progress=lambda seen: pieces.append(seen.layers_done))
    assert answer.reason == "time limit"
    assert pieces == [1, 2], "only the first layouts, no improvement"


def test_warm_start_is_never_made_worse() -> None:
    p = problem(skewed(1, 10), [1.0, 0.5, 0.5], 5, expert_bytes=2.0)
    good = solved(p, "ilp", stop=StoppingRule(2.0, 1e-3, 20))
    once = solved(p, "scalable", warm_start=good.placement, stop=StoppingRule(1.0, 1e-6, 0))
    assert once.cost.total <= good.cost.total * (1 + 1e-9)


def test_checker_sees_what_is_wrong() -> None:
    p = problem(np.array([[3.0, 1.0]]), [1.0, 1.0], 1, options=Options(pinned=(Pair(0, "d0"),)))
    good = solved(p, "ilp")
    assert check(p, good) == []
    crowded: Placement = single(("d0", "d1"), [[0, 0]])
    assert any("2 replicas, 1 slots" in f for f in check_placement(p, crowded))
    swapped = single(("d0", "d1"), [[1, 0]])
    assert any("not on 'd0', where it is pinned" in f for f in check_placement(p, swapped))
    cheat = Solution(
        good.placement, evaluate(problem(np.array([[1.0, 1.0]]), [1.0, 1.0], 1), good.placement), 0.0, "", ""
    )
    assert any("step_s: claimed" in f for f in check(p, cheat))
    assert any("above the cost" in f for f in check(p, Solution(good.placement, good.cost, 99.0, "", "")))
