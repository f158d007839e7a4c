"""Re-planning: balanced again with few new replicas; invariants R-1 to R-5."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from concertina.errors import OperatorError
from concertina.planners import replan_refine
from concertina.planners.advise import Horizon, advise, resplit
from concertina.planners.check import check_placement
from concertina.planners.check_migration import check_migration
from concertina.planners.cluster import Cluster, Device
from concertina.planners.cost import evaluate
from concertina.planners.migrate import plan_migration
from concertina.planners.migration import Migration, MigrationProblem
from concertina.planners.milp import MilpOptions
from concertina.planners.model import Loads, ModelSpec
from concertina.planners.placement import Placement, Replica, balanced_placement
from concertina.planners.problem import Options, Pair, PlacementProblem
from concertina.planners.replan import Replan, ReplanRules, replan
from concertina.planners.replan_exact import improve_exactly
from concertina.planners.replan_greedy import plan_greedy
from concertina.planners.replan_refine import RefineOptions, best_greedy, finished, refine
from concertina.planners.replan_task import LayerTask
from concertina.planners.routing import Routing
from concertina.planners.solution import Infeasible
from hypothesis import given, settings
from hypothesis import strategies as st

QUICK = ReplanRules(refine=RefineOptions(rounds=2, nodes=50, seconds=None))


def skewed(experts: int, layers: int, seed: int, sigma: float = 0.8) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0.0, sigma, (layers, experts)) * 100


def spread(tokens_LE: np.ndarray, devices: int, slots: int) -> Placement:
    """A balanced start: spare slots to the hottest, then longest first."""
    layers = []
    for tokens_E in tokens_LE:
        experts = len(tokens_E)
        count = np.ones(experts, dtype=int)
        for _ in range(devices * slots - experts):
            count[np.argmax(np.where(count < devices, tokens_E / count, -1.0))] += 1
        on: list[list[int]] = [[] for _ in range(experts)]
        load, used = np.zeros(devices), np.zeros(devices, dtype=int)
        for e in np.argsort(-tokens_E / count):
            for _ in range(count[e]):
                open_D = [d for d in range(devices) if used[d] < slots and d not in on[e]]
                if open_D:
                    d = min(open_D, key=lambda d: load[d])
                    on[e].append(d)
                    load[d] += tokens_E[e] / count[e]
                    used[d] += 1
        next_slot = [0] * devices
        row = []
        for devices_of in on:
            replicas = []
            for d in sorted(devices_of):
                replicas.append(Replica(d, next_slot[d], 1 / len(devices_of)))
                next_slot[d] += 1
            row.append(tuple(replicas))
        layers.append(tuple(row))
    return Placement(tuple(f"d{i}" for i in range(devices)), tuple(layers))


def cluster_of(names: list[str], slow: dict[str, float] | None = None, nodes: int = 1) -> Cluster:
    slow = slow or {}
    return Cluster(
        tuple(Device(n, "k", 10**12, 1e12 * slow.get(n, 1.0), 1e30, f"node{i % nodes}") for i, n in enumerate(names))
    )


def problem_of(
    experts: int, before: int, after: list[str], spare: int = 2, seed: int = 0, layers: int = 1, sigma: float = 0.8
) -> PlacementProblem:
    tokens_LE = skewed(experts, layers, seed, sigma)
    slots = -(-experts // before) + spare
    current = spread(tokens_LE, before, slots)
    model = ModelSpec(layers, experts, 1000.0, 1e6)
    return PlacementProblem(cluster_of(after), model, Loads(tokens_LE), slots=slots, current=current)


def names(count: int) -> list[str]:
    return [f"d{i}" for i in range(count)]


def lost(problem: PlacementProblem) -> int:
    return int((~problem.held_LED.any(axis=2)).sum())


def solved(problem: PlacementProblem, rules: ReplanRules = QUICK) -> Replan:
    answer = replan(problem, rules)
    assert isinstance(answer, Replan), answer
    return answer


def sound(problem: PlacementProblem, answer: Replan) -> None:
    """The placement keeps slots and rules, and the numbers of the answer are those of the placement."""
    placement = answer.placement
    assert placement.devices == problem.cluster.names
    new = 0
    for layer, devices in enumerate(placement.experts_LD):
        for d, experts in enumerate(devices):
            assert len(experts) <= problem.slots_LD[layer, d]
            new += sum(not problem.held_LED[layer, e, d] for e in experts)
            assert not any(problem.forbidden_LED[layer, e, d] for e in experts)
    assert sum(answer.new_replicas_L) == new
    assert answer.least_bytes <= answer.moved_bytes + 1e-6
    time_L = evaluate(problem, placement).device_LD.max(axis=1)
    np.testing.assert_allclose(time_L, answer.time_L, rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(st.integers(4, 30), st.integers(2, 6), st.integers(-2, 3), st.integers(0, 2), st.integers(0, 10**6))
def test_answers_are_sound(experts: int, before: int, change: int, spare: int, seed: int) -> None:
    """R-1: slots, rules and numbers hold; layers not named as missed reach the balance; same seed, same plan."""
    after = names(max(2, before + change))
    problem = problem_of(experts, before, after, spare, seed, layers=2)
    answer = replan(problem, QUICK)
    if isinstance(answer, Infeasible):
        assert problem.slots_LD[0].sum() <= experts + len(after)
        return
    sound(problem, answer)
    for layer in set(range(2)) - set(answer.missed):
        assert answer.balance_L[layer] >= 0.98 - 1e-3
    again = solved(problem)
    assert again.placement == answer.placement


@pytest.mark.parametrize("seed", range(3))
def test_losing_one_of_eight_devices_copies_little_more_than_what_was_lost(seed: int) -> None:
    """R-2: 64 experts, 8 to 7 devices at 0.98: the lost experts, at most one replica more."""
    problem = problem_of(64, 8, names(7), seed=seed)
    answer = solved(problem, ReplanRules())
    sound(problem, answer)
    assert answer.missed == ()
    assert lost(problem) <= answer.new_replicas_L[0] <= lost(problem) + 1


@pytest.mark.parametrize(("after", "most"), [(36, 12), (28, 31)])
def test_copies_at_most_the_reference_numbers(after: int, most: int) -> None:
    """R-3: 256 experts from 32 devices to 36 and to 28, at 0.98."""
    problem = problem_of(256, 32, names(after), seed=1, sigma=0.5)
    answer = solved(problem, ReplanRules(refine=RefineOptions(rounds=4, seconds=None)))
    assert answer.missed == ()
    assert answer.new_replicas_L[0] <= max(most, lost(problem) + 2)


def test_nothing_changed_copies_nothing() -> None:
    """R-4: with devices and loads as they were, no replica is copied."""
    problem = problem_of(32, 4, names(4))
    answer = solved(problem)
    assert answer.moved_bytes == 0
    assert answer.reason == "balanced with the fewest bytes possible"


def test_a_device_that_slows_down_gives_load_away() -> None:
    problem = problem_of(64, 8, names(8))
    bit = replace(problem, cluster=cluster_of(names(8), {"d3": 0.5}))
    assert solved(bit, ReplanRules()).moved_bytes == 0, "splitting tokens afresh is enough"
    slow = replace(problem, cluster=cluster_of(names(8), {"d3": 0.1, "d4": 0.3}))
    answer = solved(slow, ReplanRules())
    sound(slow, answer)
    assert answer.missed == ()
    assert 0 < answer.moved_bytes <= 20 * 1000.0


def test_pins_bans_and_nodes_are_kept() -> None:
    base = problem_of(16, 4, names(4), spare=5)
    options = Options(min_nodes=2, pinned=(Pair(3, "d2"),), forbidden=(Pair(0, "d0"),))
    problem = replace(base, cluster=cluster_of(names(4), nodes=2), options=options)
    answer = solved(problem)
    sound(problem, answer)
    for e, replicas in enumerate(answer.placement.replicas_LE[0]):
        assert len({r.device % 2 for r in replicas}) == 2, e
    assert 2 in [r.device for r in answer.placement.replicas_LE[0][3]]


def test_groups_stay_together() -> None:
    base = problem_of(12, 3, names(3), spare=4)
    together = spread(np.ones((1, 12)), 3, 4)
    groups = tuple(tuple(d) for d in together.experts_LD[0])
    problem = replace(base, current=together, options=Options(groups=groups), cluster=cluster_of(names(2)))
    answer = replan(replace(problem, slots=8), QUICK)
    assert isinstance(answer, Replan)
    for group in groups:
        assert len({tuple(r.device for r in answer.placement.replicas_LE[0][e]) for e in group}) == 1


def test_no_room_is_infeasible_and_says_how_much_is_missing() -> None:
    problem = replace(problem_of(16, 4, names(3), spare=0), slots=5)
    answer = replan(problem, QUICK)
    assert isinstance(answer, Infeasible)
    assert "needs 16 slots, has 15 (1 short)" in str(answer)


def test_the_current_placement_is_needed() -> None:
    problem = replace(problem_of(8, 2, names(2)), current=None)
    with pytest.raises(OperatorError, match=r"replan: problem.current"):
        replan(problem)
    with pytest.raises(OperatorError, match="replan: balance"):
        ReplanRules(balance=0.0)


def plain_task(tokens: list[float], kept: list[set[int]], capacity: list[float], slots: int) -> LayerTask:
    count, devices = len(tokens), len(capacity)
    none = (frozenset[int](),) * count
    return LayerTask(
        tokens,
        [1.0] * count,
        [[0.0] * devices] * count,
        capacity,
        [1] * count,
        [slots] * devices,
        tuple(frozenset(k) for k in kept),
        none,
        none,
        [0] * devices,
    )


def fewest_copies(task: LayerTask, most: int) -> int | None:
    """Brute force: the fewest new replicas with which all tokens fit, or None above ``most``."""
    import itertools

    pairs = [(e, d) for e in range(task.experts) for d in range(task.devices)]
    held = [p for p in pairs if p[1] in task.kept_E[p[0]]]
    free = [p for p in pairs if p not in held]
    for count in range(most + 1):
        for new in itertools.combinations(free, count):
            for gone in range(len(held) + 1):
                for drop in itertools.combinations(held, gone):
                    if fits([*(p for p in held if p not in drop), *new], task):
                        return count
    return None


def fits(pairs: list[tuple[int, int]], task: LayerTask) -> bool:
    state = Routing.empty(task.tokens_E, task.read_ED, task.capacity_D)
    for e, d in pairs:
        state.add(e, d)
    if not all(state.flow_E) or any(len(h) > s for h, s in zip(state.held_D, task.slots_D, strict=True)):
        return False
    return state.relieve()[0] <= 0


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_the_program_over_all_devices_equals_brute_force(data: st.DataObject) -> None:
    """R-5: with every device and expert in its columns, the program copies the fewest replicas there are."""
    devices, experts = 3, 4
    tokens = [float(data.draw(st.integers(1, 9))) for _ in range(experts)]
    kept = [data.draw(st.sets(st.integers(0, devices - 2), max_size=2)) for _ in range(experts)]
    task = plain_task(tokens, kept, [max(sum(tokens) / devices / 0.9, 1.0)] * devices, 3)
    best = fewest_copies(task, 4)
    start = plan_greedy(task)
    if start.unplaced:
        return
    state = improve_exactly(task, start.state, range(devices), range(experts), MilpOptions(warm_start=True))
    assert state is not None
    if best is None:
        return
    assert state.excess() <= 1e-6 * sum(tokens)
    assert task.new_bytes(state) == best
    assert task.least_bytes() <= best + 1e-9


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(3, 10))
def test_refining_never_makes_it_worse(seed: int, devices: int, experts: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.lognormal(0, 1, experts).tolist()
    kept = [set(rng.choice(devices, rng.integers(0, 3), replace=True).tolist()) for _ in range(experts)]
    task = plain_task(tokens, kept, [sum(tokens) / devices / 0.95] * devices, -(-experts // devices) + 1)
    first = best_greedy(task)
    better = refine(first, RefineOptions(rounds=2, nodes=50, seconds=None), seed)
    assert better.score <= first.score
    if finished(better):
        assert task.least_bytes() <= task.new_bytes(better.state) + 1e-9


@pytest.mark.parametrize(("seconds", "expected"), [(1.0, [1.0, 0.25]), (None, [None, 0.25])])
def test_no_program_gets_more_time_than_is_left(
    monkeypatch: pytest.MonkeyPatch, seconds: float | None, expected: list[float | None]
) -> None:
    """A resize has 50 ms to plan, and its programs alone may take a second each."""
    task = plain_task([5.0, 3.0, 2.0, 1.0], [{0}, {0}, {0}, {0}], [4.0] * 3, 4)
    first, left_s = plan_greedy(task), iter([inf, 0.25, -0.01])
    limits: list[float | None] = []

    def improve(_task: LayerTask, state: Routing, _devices: object, _wanted: object, given: MilpOptions) -> Routing:
        limits.append(given.time_limit_s)
        return state

    monkeypatch.setattr(replan_refine, "improve_exactly", improve)
    monkeypatch.setattr(replan_refine, "finished", lambda _search: False)
    refine(first, RefineOptions(seconds=seconds), 0, lambda: next(left_s))
    assert limits == expected


def migrated(problem: PlacementProblem, answer: Replan) -> Migration:
    assert problem.current is not None
    move = MigrationProblem(problem.cluster, problem.model, problem.current, answer.placement)
    migration = plan_migration(move)
    assert isinstance(migration, Migration)
    assert check_migration(move, migration) == []
    return migration


def test_advice_weighs_gain_against_price() -> None:
    problem = problem_of(64, 8, names(9))
    answer = solved(problem)
    migration = migrated(problem, answer)
    assert migration.moved_bytes == answer.moved_bytes
    long = advise(problem, answer.placement, migration, Horizon(seconds=3600.0))
    assert long.action == "migrate"
    assert long.gain_s > long.price_s
    assert long.stay_step_s > long.migrate_step_s
    dear = advise(problem, answer.placement, migration, Horizon(seconds=10.0, pause_s=60.0))
    assert dear.action == "stay"
    assert "net" in dear.reason
    assert dear.price_s >= 60.0


def test_advice_when_experts_are_lost_is_to_migrate() -> None:
    problem = problem_of(64, 8, names(7))
    answer = solved(problem)
    advice = advise(problem, answer.placement, migrated(problem, answer), Horizon(seconds=1.0, pause_s=100.0))
    assert advice.action == "migrate"
    assert advice.stay is None
    assert "no replica left" in advice.reason


def test_resplitting_moves_nothing_and_is_never_slower() -> None:
    base = problem_of(32, 4, names(4))
    drifted = replace(base, loads=Loads(skewed(32, 1, seed=9)))
    again = resplit(drifted)
    assert again is not None
    assert base.current is not None
    assert again.experts_LD == base.current.experts_LD
    assert evaluate(drifted, again).total <= evaluate(drifted, base.current).total * (1 + 1e-6)


def test_uneven_start_from_the_simple_default_is_balanced_again() -> None:
    tokens_LE = skewed(24, 2, seed=5)
    current = balanced_placement(names(3), 2, 24)
    problem = PlacementProblem(
        cluster_of(names(3)), ModelSpec(2, 24, 1000.0, 1e6), Loads(tokens_LE), slots=10, current=current
    )
    answer = solved(problem, ReplanRules())
    sound(problem, answer)
    assert answer.missed == ()


def test_full_devices_of_single_replicas_exchange_them_to_reach_the_balance() -> None:
    """Two devices slow down, slots are nearly full: adding replicas alone stays below 0.75 of the best speed."""
    names = [f"d{i}" for i in range(8)]
    start = problem_of(64, 8, names, spare=4, layers=3)
    left = [names[i] for i in (0, 1, 2, 4, 5, 6)]
    slow = {"d2": 0.2, "d5": 0.2}
    p = replace(start, cluster=cluster_of(left, slow))
    answer = replan(p, QUICK)
    assert isinstance(answer, Replan)
    assert answer.missed == ()
    assert answer.balance_L.min() >= 0.98 * (1 - 1e-6)
    assert check_placement(p, answer.placement) == []
