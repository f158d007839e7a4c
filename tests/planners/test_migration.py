"""Migrations: every intermediate state is sound, bytes are the fewest where memory allows; invariants M-1 to M-4."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from concertina.errors import OperatorError
from concertina.planners.assignment import best_assignment, match_placement, match_slots
from concertina.planners.check_migration import check_migration
from concertina.planners.cluster import Cluster, Device, Links
from concertina.planners.migrate import plan_migration
from concertina.planners.migration import Free, Migration, MigrationProblem, Move, Phase, Transport
from concertina.planners.model import ModelSpec
from concertina.planners.placement import Placement, Replica, balanced_placement
from concertina.planners.solution import Infeasible
from hypothesis import given, settings
from hypothesis import strategies as st

UNIT = 100


def cluster_of(names: list[str], memory: int | list[int], nodes: int = 2) -> Cluster:
    sizes = memory if isinstance(memory, list) else [memory] * len(names)
    devices = (
        Device(n, "cpu", m, 1e9, 1e9, f"node{i % nodes}") for i, (n, m) in enumerate(zip(names, sizes, strict=True))
    )
    return Cluster(tuple(devices), Links(400.0, 100.0))


def place(names: list[str], layers: list[list[list[int]]]) -> Placement:
    """From ``layers[l][e]``: device indices of the expert's replicas."""
    counts = [[0] * len(names) for _ in layers]
    result = []
    for layer, experts in enumerate(layers):
        row = []
        for devices in experts:
            replicas = []
            for d in devices:
                replicas.append(Replica(d, counts[layer][d], 1 / len(devices)))
                counts[layer][d] += 1
            row.append(tuple(replicas))
        result.append(tuple(row))
    return Placement(tuple(names), tuple(result))


def random_placement(rng: random.Random, names: list[str], layers: int, experts: int, extra: float) -> Placement:
    table = []
    for _ in range(layers):
        row = []
        for _ in range(experts):
            count = min(len(names), 1 + (rng.random() < extra))
            row.append(rng.sample(range(len(names)), count))
        table.append(row)
    return place(names, table)


def solved(problem: MigrationProblem) -> Migration:
    answer = plan_migration(problem)
    assert isinstance(answer, Migration), answer
    assert check_migration(problem, answer) == []
    return answer


@st.composite
def problems(draw: st.DrawFn) -> MigrationProblem:
    rng = random.Random(draw(st.integers(0, 10**6)))
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    old_names = [f"d{i}" for i in range(draw(st.integers(1, 5)))]
    new_names = [f"d{i}" for i in range(draw(st.integers(0, 3)), 6)]
    dead = {n for n in old_names if n not in new_names and draw(st.booleans())}
    old = random_placement(rng, old_names, layers, experts, draw(st.sampled_from([0.0, 0.5])))
    new = random_placement(rng, new_names, layers, experts, draw(st.sampled_from([0.0, 0.5])))
    sizes = [
        [rng.choice([UNIT, UNIT, 3 * UNIT]) if draw(st.booleans()) else UNIT for _ in range(experts)]
        for _ in range(layers)
    ]
    model = ModelSpec(layers, experts, np.array(sizes), 1.0)
    names = sorted(set(old_names) | set(new_names) - dead - set())
    names = [n for n in names if n not in dead]
    roomy = MigrationProblem(cluster_of(names, 10**9), model, old, new)
    slack = draw(st.integers(0, 3)) * UNIT
    memory = [int(max(roomy.weights(roomy.start[n]), roomy.weights(roomy.goal[n]))) + slack for n in names]
    return replace(roomy, cluster=cluster_of(names, memory))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_every_intermediate_state_is_sound(problem: MigrationProblem) -> None:
    """M-1: memory, serving and sources hold after every move and free, and the end is the new placement."""
    answer = plan_migration(problem)
    if isinstance(answer, Infeasible):
        assert answer.lacks
        assert all(lack.needed > lack.available for lack in answer.lacks)
    else:
        assert check_migration(problem, answer) == []


@settings(max_examples=80, deadline=None)
@given(problems())
def test_with_room_only_what_is_missing_is_copied(problem: MigrationProblem) -> None:
    """M-2: with memory for old and new together there is one phase, and exactly the missing replicas are copied."""
    names = list(problem.cluster.names)
    problem = replace(problem, cluster=cluster_of(names, 10**9))
    answer = solved(problem)
    missing = sum(problem.weights(problem.goal[n] - problem.start[n]) for n in names)
    assert answer.moved_bytes == missing
    assert answer.detour_bytes == 0
    assert len(answer.phases) <= 1
    alive = {key for keys in problem.start.values() for key in keys}
    assert all((m.source is None) == ((m.layer, m.expert) not in alive) for m in answer.moves)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 10**6))
def test_one_spare_place_is_enough_for_any_exchange(devices: int, layers: int, seed: int) -> None:
    """M-3: full devices may exchange experts at will as long as one expert's worth of memory is free anywhere."""
    rng = random.Random(seed)
    names = [f"d{i}" for i in range(devices)]
    per = 2
    table = [[[i // per] for i in range(devices * per)] for _ in range(layers)]
    shuffled = []
    for row in table:
        order = row[:]
        rng.shuffle(order)
        shuffled.append(order)
    model = ModelSpec(layers, devices * per, UNIT, 1.0)
    memory = [UNIT * per * layers] * devices
    memory[rng.randrange(devices)] += UNIT
    problem = MigrationProblem(cluster_of(names, memory), model, place(names, table), place(names, shuffled))
    answer = solved(problem)
    assert answer.moved_bytes >= sum(problem.weights(problem.goal[n] - problem.start[n]) for n in names)


def test_a_swap_without_any_room_names_the_devices_and_the_bytes() -> None:
    names = ["a", "b"]
    model = ModelSpec(1, 2, UNIT, 1.0)
    problem = MigrationProblem(cluster_of(names, UNIT), model, place(names, [[[0], [1]]]), place(names, [[[1], [0]]]))
    answer = plan_migration(problem)
    assert isinstance(answer, Infeasible)
    assert not answer.proven
    assert [lack.needed - lack.available for lack in answer.lacks] == [UNIT, UNIT]
    assert "device 'a': room for layer 0 expert 1" in str(answer)


def test_a_swap_goes_through_the_only_spare_place() -> None:
    names = ["a", "b", "c"]
    model = ModelSpec(1, 2, UNIT, 1.0)
    problem = MigrationProblem(cluster_of(names, UNIT), model, place(names, [[[0], [1]]]), place(names, [[[1], [0]]]))
    answer = solved(problem)
    assert answer.detour_bytes == UNIT
    assert answer.moved_bytes == 3 * UNIT
    assert all(p <= UNIT for p in answer.peak_bytes.values())


def test_a_doubled_replica_makes_way_when_there_is_no_spare_place() -> None:
    names = ["a", "b", "c", "d"]
    model = ModelSpec(1, 3, UNIT, 1.0)
    old, new = place(names, [[[0], [1], [2, 3]]]), place(names, [[[1], [0], [2, 3]]])
    answer = solved(MigrationProblem(cluster_of(names, UNIT), model, old, new))
    assert answer.detour_bytes == 2 * UNIT


def test_too_much_for_a_device_is_refused_with_the_bytes() -> None:
    names = ["a", "b"]
    model = ModelSpec(2, 2, UNIT, 1.0)
    old, new = place(names, [[[0], [1]]] * 2), place(names, [[[0], [0]]] * 2)
    answer = plan_migration(MigrationProblem(cluster_of(names, 3 * UNIT), model, old, new))
    assert isinstance(answer, Infeasible)
    assert answer.proven
    assert str(answer) == "infeasible: device 'a': experts of the new placement: needs 400 bytes, has 300 (100 short)"


def test_lost_experts_come_from_the_checkpoint_first() -> None:
    old = place(["a", "dead"], [[[0], [1], [0]]])
    new = place(["a", "b"], [[[0], [1], [1]]])
    model = ModelSpec(1, 3, UNIT, 1.0)
    problem = MigrationProblem(cluster_of(["a", "b"], [2 * UNIT, 2 * UNIT]), model, old, new)
    answer = solved(problem)
    assert answer.phases[0].moves[0] == Move(0, 1, None, "b", UNIT)
    assert answer.checkpoint_bytes == UNIT


def test_a_leaving_device_is_read_from_and_emptied() -> None:
    old, new = place(["a", "b"], [[[0], [1]]]), place(["a"], [[[0], [0]]])
    model = ModelSpec(1, 2, UNIT, 1.0)
    answer = solved(MigrationProblem(cluster_of(["a", "b"], 2 * UNIT), model, old, new))
    assert answer.moves == (Move(0, 1, "b", "a", UNIT),)
    assert answer.phases[-1].frees == (Free(0, 1, "b", UNIT),)


def test_sources_are_balanced_and_time_is_that_of_the_busiest_link() -> None:
    names = ["a", "b", "c", "d"]
    old = place(names[:2], [[[0, 1]] * 4])
    new = place(names, [[[0, 1, 2 + e % 2] for e in range(4)]])
    model = ModelSpec(1, 4, UNIT, 1.0)
    cluster = cluster_of(names, 10**6, nodes=1)
    answer = solved(MigrationProblem(cluster, model, old, new, transport=Transport(phase_s=0.5)))
    assert sorted(m.source or "" for m in answer.moves) == ["a", "a", "b", "b"]
    assert answer.seconds == pytest.approx(0.5 + 2 * UNIT / 400.0)


def test_sources_on_the_same_node_are_preferred() -> None:
    names = ["a", "b", "c"]  # a and c share a node
    old, new = place(names, [[[0, 1]]]), place(names, [[[0, 1, 2]]])
    model = ModelSpec(1, 1, UNIT, 1.0)
    answer = solved(MigrationProblem(cluster_of(names, 10**6), model, old, new))
    assert answer.moves[0].source == "a"


@pytest.mark.parametrize("seed", range(5))
def test_assignment_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gain = rng.integers(0, 9, (4, 5)).astype(float)
    answer = best_assignment(gain)
    assert len(set(answer)) == 4
    best = max(sum(gain[i, p[i]] for i in range(4)) for p in itertools.permutations(range(5), 4))
    assert sum(gain[i, c] for i, c in enumerate(answer)) == best


def test_relabelling_alike_devices_saves_moves_and_keeps_loads() -> None:
    """M-4: a plan whose parts were only exchanged between alike devices costs nothing to reach."""
    names = [f"d{i}" for i in range(4)]
    old = balanced_placement(names, 2, 8)
    swapped = Placement(
        old.devices,
        tuple(
            tuple(tuple(replace(r, device=(r.device + 2) % 4) for r in reps) for reps in row) for row in old.replicas_LE
        ),
    )
    assert match_placement(old, swapped, cluster_of(names, 10**6)) == old
    different = cluster_of(names, [10**6, 10**6, 2 * 10**6, 2 * 10**6], nodes=1)
    assert match_placement(old, swapped, different) != old


def test_slots_of_what_stays_do_not_change() -> None:
    names = ["a", "b"]
    old, new = place(names, [[[0], [0], [0], [1]]]), place(names, [[[1], [0], [0], [0]]])
    matched = match_slots(old, new)
    assert matched.experts_LD[0] == ((3, 1, 2), (0,))


def test_check_finds_faults() -> None:
    names = ["a", "b"]
    model = ModelSpec(1, 2, UNIT, 1.0)
    problem = MigrationProblem(cluster_of(names, UNIT), model, place(names, [[[0], [1]]]), place(names, [[[0], [0]]]))
    bad = Migration(
        problem.new,
        (
            Phase((Move(0, 1, "a", "a", 1.0),), (Free(0, 0, "a", UNIT), Free(0, 0, "b", UNIT)), 0.0),
            Phase((Move(0, 1, "b", "c", UNIT),), (), 0.0),
        ),
        {"a": 0.0, "b": 0.0},
    )
    wrong = "\n".join(check_migration(problem, bad))
    for part in (
        "has no complete replica",
        "the limit is",
        "1.0 bytes",
        "nobody else",
        "is not there",
        "end: a",
        "peak: a",
    ):
        assert part in wrong
    assert "the target is not in the cluster" in wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": balanced_placement(["a"], 2, 3)}, "old: 2 layers of 3 experts; expected 1 of 2"),
        ({"new": balanced_placement(["z"], 1, 2)}, "new: devices ['z'] are not in the cluster"),
        ({"reserve_bytes": -1}, "reserve_bytes"),
    ],
)
def test_bad_problems_are_refused(change: dict[str, object], message: str) -> None:
    model = ModelSpec(1, 2, UNIT, 1.0)
    problem = MigrationProblem(
        cluster_of(["a"], 999), model, balanced_placement(["a"], 1, 2), balanced_placement(["a"], 1, 2)
    )
    with pytest.raises(OperatorError) as caught:
        replace(problem, **change)
    assert message in str(caught.value)
