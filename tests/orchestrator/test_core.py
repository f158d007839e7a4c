"""The controller's decisions, over random orders of everything that happens (invariants C1 to C4)."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from concertina.orchestrator.core.facts import Commit, Fill, OpenStore, Prepare, StartOwner, StartWorker
from concertina.orchestrator.core.state import State
from hypothesis import given, settings
from hypothesis import strategies as st

from .core_world import World, make_layout

TWO = [("cpu-0", "a"), ("cpu-1", "a")]
ORDERS = st.integers(0, 2**32).map(random.Random)
SEATS = st.integers(1, 5).map(lambda n: [(f"cpu-{i}", "ab"[i % 2]) for i in range(n)])


def settle(world: World, state: State, order: random.Random) -> State:
    """Let effects end in any order until nothing is left to do."""
    for _ in range(500):
        state = world.turn(state).state
        if not world.busy:
            return state
        for _ in range(order.randint(0, len(world.busy))):
            world.finish(order.randrange(len(world.busy)))
    raise AssertionError("it does not come to rest")


@given(SEATS, st.sampled_from(["shared", "separate"]), st.sampled_from(["solo", "shared", "gloo"]), ORDERS)
@settings(max_examples=60, deadline=None)
def test_every_order_ends_with_the_target_serving(seats, memory_mode, exchange, order):
    """C1: whatever the order in which effects end, the target serves and every extent it needs is there."""
    layout = make_layout(seats, exchange, memory_mode)
    world = World()
    state = settle(world, State(target=layout), order)
    assert state.serving is not None
    assert state.serving.layout == layout
    assert state.pending is None
    assert not state.failure
    for pool, requests in layout.extents(state.serving.id).items():
        assert set(world.pools[pool].pages) == {r.key for r in requests}
    assert all(world.workers[w].serving == state.serving.id for w in state.serving.workers)


@given(SEATS, ORDERS)
@settings(max_examples=60, deadline=None)
def test_stages_come_in_order(seats, order):
    """C2: nobody prepares before all extents are there; nobody commits before all have prepared."""
    layout = make_layout(seats)
    world, state = World(), State(target=layout)
    for _ in range(200):
        decision = world.turn(state)
        state = decision.state
        for effect in decision.effects:
            if isinstance(effect, Prepare):
                for pool, requests in layout.extents(effect.generation).items():
                    assert {r.key for r in requests} <= set(world.pools[pool].pages)
            if isinstance(effect, Commit):
                assert all(effect.generation in world.workers[w].prepared for w in state.pending.record.workers)
        if not world.busy:
            break
        world.finish(order.randrange(len(world.busy)))
    assert state.serving is not None


@given(SEATS, SEATS, ORDERS)
@settings(max_examples=60, deadline=None)
def test_a_new_target_replaces_the_old_one(before, after, order):
    """C3: from any layout to any other; devices that stay keep their worker, leftovers go."""
    world = World()
    state = settle(world, State(target=make_layout(before)), order)
    old = dict(zip([s[0] for s in before], state.serving.workers, strict=True))
    state = settle(world, replace(state, target=make_layout(after)), order)
    assert not state.failure
    assert [s.device for s in state.serving.layout.seats] == [s[0] for s in after]
    assert set(world.workers) == set(state.serving.workers)
    for (device, _), worker in zip(after, state.serving.workers, strict=True):
        assert worker == old.get(device, worker)
    held = {key for fact in world.pools.values() for key in fact.pages}
    assert not any(key.startswith("exchange/") and key != f"exchange/{state.serving.id}" for key in held)


@given(SEATS, ORDERS)
@settings(max_examples=40, deadline=None)
def test_doubled_wake_ups_change_nothing(seats, order):
    """C4: asking again with the same snapshot asks for nothing new."""
    world, state = World(), State(target=make_layout(seats))
    for _ in range(100):
        state = world.turn(state).state
        again = world.turn(state)
        assert again.effects == ()
        assert again.state == state
        if not world.busy:
            break
        world.finish(order.randrange(len(world.busy)))


@pytest.mark.parametrize("kind", [StartOwner, StartWorker, Fill, Prepare, Commit, OpenStore])
def test_a_failed_effect_ends_it_with_its_reason(kind):
    world, state = World(), State(target=make_layout(TWO, "gloo"))
    for _ in range(100):
        state = world.turn(state).state
        hit = next((i for i, e in enumerate(world.busy) if isinstance(e, kind)), None)
        if hit is not None:
            world.fail(hit, "out of pages")
            decision = world.turn(state)
            assert decision.state.failure == "out of pages"
            assert decision.effects == ()
            assert world.turn(decision.state).effects == ()
            return
        world.finish(0)
    raise AssertionError(f"no {kind.__name__} was asked for")


def test_a_dead_member_is_named():
    world, state = World(), State(target=make_layout(TWO))
    while state.serving is None:
        state = world.turn(state).state
        while world.busy:
            world.finish(0)
    world.kill(state.serving.workers[1])
    decision = world.turn(state)
    assert decision.state.failure == "worker 1 (cpu-1): its process ended"


def test_shared_memory_holds_an_expert_once():
    layout = make_layout(TWO)
    (requests,) = layout.extents(1).values()
    keys = [r.key for r in requests]
    assert len(keys) == len(set(keys))
    assert sum(r.purpose == "experts" for r in requests) == 2 * 5
    separate = make_layout(TWO, memory_mode="separate").extents(1)
    assert set(separate) == {"node/a", "device/cpu-0", "device/cpu-1"}
    assert sum(r.purpose == "experts" for rs in separate.values() for r in rs) == 2 * 5


def test_pools_have_room_for_what_they_must_hold():
    for mode in ("shared", "separate"):
        layout = make_layout(TWO, memory_mode=mode)
        for pool, requests in layout.extents(1).items():
            assert layout.pool_pages(pool) > sum(r.pages for r in requests)
