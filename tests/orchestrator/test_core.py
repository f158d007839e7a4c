"""The controller's decisions where nothing fails, over random orders of everything that happens (C1 to C4)."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace

import pytest
from concertina.orchestrator.core.facts import (
    Abandon,
    Commit,
    Free,
    HandOver,
    Park,
    PoolFact,
    Prepare,
    ResizeKV,
    Snapshot,
    StartOwner,
    StartWorker,
    StopOwner,
    StopWorker,
    WorkerFact,
)
from concertina.orchestrator.core.inventory import Entry, Inventory, Kind
from concertina.orchestrator.core.layout import Layout, Seat
from concertina.orchestrator.core.leftovers import yields
from concertina.orchestrator.core.operations import request
from concertina.orchestrator.core.state import Operation, Pending, Record, Stage, State
from concertina.orchestrator.core.step import step
from concertina.planners.placement import Placement
from hypothesis import given, settings
from hypothesis import strategies as st

from .core_layouts import family, make_layout, node_pages, random_placement
from .core_rest import check_rest
from .core_schedule import Schedule

TWO = [("cpu-0", "a"), ("cpu-1", "a")]
MODES = st.sampled_from(["shared", "separate"])
ORDERS = st.integers(0, 2**32).map(random.Random)
SEATS = st.integers(1, 5).map(lambda n: [(f"cpu-{i}", "ab"[i % 2]) for i in range(n)])


def calm(order: random.Random, mode: str, *seats: list[tuple[str, str]], exchange: str = "shared") -> Schedule:
    """A deployment without faults that goes between layouts on these seats."""
    schedule = Schedule(order.randrange(2**32), faults=False)
    placed = [make_layout(s, exchange, mode, random_placement(order, [device for device, _ in s])) for s in seats]
    schedule.use(mode, node_pages(placed))
    return schedule


@given(SEATS, MODES, st.sampled_from(["solo", "shared", "gloo"]), ORDERS)
@settings(max_examples=60, deadline=None)
def test_every_order_ends_with_the_target_serving(seats, mode, exchange, order):
    """C1: whatever the order in which effects end, the target serves and every extent it needs is there."""
    schedule = calm(order, mode, seats, exchange=exchange)
    schedule.ask("start", schedule.layouts)
    schedule.settle()
    assert schedule.state.serving is not None
    assert schedule.state.serving.layout == schedule.layouts[0]
    check_rest(schedule.state, schedule.world, schedule.routes)


@given(SEATS, SEATS, MODES, ORDERS)
@settings(max_examples=60, deadline=None)
def test_a_new_target_replaces_the_old_one(before, after, mode, order):
    """C3: from any layout to any other; devices that stay keep their worker, leftovers go."""
    schedule = calm(order, mode, before, after)
    schedule.ask("start", schedule.layouts[:1])
    schedule.settle()
    old = dict(zip([device for device, _ in before], schedule.state.serving.workers, strict=True))
    schedule.ask("scale", schedule.layouts[1:])
    schedule.settle()
    check_rest(schedule.state, schedule.world, schedule.routes)
    record = schedule.state.serving
    assert record.layout == schedule.layouts[1]
    for device, worker in zip(record.layout.devices, record.workers, strict=True):
        assert worker == old.get(device, worker)


@given(SEATS, ORDERS)
@settings(max_examples=40, deadline=None)
def test_doubled_wake_ups_change_nothing(seats, order):
    """C4: asking again with the same snapshot, and what was asked for under way, asks for nothing new."""
    schedule = calm(order, "shared", seats)
    schedule.ask("start", schedule.layouts)
    for _ in range(200):
        schedule.turn()
        again = step(schedule.state, schedule.world.snapshot())
        assert again.effects == ()
        assert again.state == schedule.state
        if not schedule.world.busy:
            break
        schedule.world.advance(order.choice(list(schedule.world.busy)))
    assert schedule.state.serving is not None


def test_who_has_no_role_yet_commits_first():
    """C2: a running worker offers the switch when everybody whom the generation lacks has come."""
    state, snapshot = _switching(WorkerFact("a", frozenset({2}), device="cpu-1", kv_blocks=7))
    assert step(state, snapshot).effects == (Commit("worker-1", 2),)
    state, snapshot = _switching(WorkerFact("a", serving=2, device="cpu-1", kv_blocks=7))
    assert step(state, snapshot).effects == (Commit("worker-0", 2),)


def test_nobody_offers_what_a_member_has_not_prepared():
    """C2."""
    state, snapshot = _switching(WorkerFact("a"))
    state = replace(state, pending=replace(state.pending, stage=Stage.FILL))
    assert step(state, snapshot).effects == (Prepare("worker-1", 2),)


def test_who_is_being_told_to_prepare_what_is_given_up_is_told_so_first():
    """Also where nobody has prepared it yet, and by a controller that does not know whom an earlier one had told."""
    state, snapshot = _switching(WorkerFact("a"))
    doomed = replace(state, pending=replace(state.pending, stage=Stage.PREPARE, doomed="canceled"))
    serving = replace(snapshot.workers["worker-0"], prepared=frozenset())
    for busy, joining in ((frozenset({Prepare("worker-1", 2)}), frozenset()), (frozenset(), frozenset({2}))):
        joiner = WorkerFact("a", joining=joining)
        seen = replace(snapshot, workers={"worker-0": serving, "worker-1": joiner}, busy=busy)
        decided = step(doomed, seen)
        assert decided.state.attempts == 0
        assert Abandon("worker-1", 2) in decided.effects
        told = replace(joiner, joining=frozenset(), abandoned=2)  # it may go on for a while
        assert step(doomed, replace(seen, workers={**seen.workers, "worker-1": told})).state.attempts == 1


def test_nobody_who_is_being_stopped_gets_a_role():
    state, snapshot = _at_rest("shared", 2)
    idle = {f"worker-{i}": WorkerFact("a") for i in (2, 3)}
    seen = replace(snapshot, workers={**snapshot.workers, **idle}, busy=frozenset({StopWorker("worker-2")}))
    asked = request(state, "scale", "3 workers", (make_layout([*TWO, ("cpu-2", "a")]),), 0.0)
    pending = step(asked, seen).state.pending
    assert pending is not None
    assert pending.record.workers == ("worker-0", "worker-1", "worker-3")


def test_kv_whose_extent_has_too_many_pages_is_made_to_agree():
    """An extent that an interrupted hand-over or resizing left too large would keep its pages for ever."""
    layout = make_layout(TWO[:1], "solo")
    record = Record(1, layout, ("worker-0",))
    pages = {r.key: (0,) * r.pages for r in layout.extents(1)["node/a"]}
    blocks = layout.kv_blocks(0)
    fact = WorkerFact("a", serving=1, device="cpu-0", kv_blocks=blocks)
    tidy = Snapshot(frozenset("a"), {"node/a": PoolFact("a", "", pages)}, {"worker-0": fact})
    assert step(State(serving=record), tidy).effects == ()
    left = {**pages, "kv/cpu-0": pages["kv/cpu-0"] + (0, 0)}
    untidy = replace(tidy, pools={"node/a": PoolFact("a", "", left)})
    assert step(State(serving=record), untidy).effects == (ResizeKV("worker-0", blocks),)


@pytest.mark.parametrize("exchange", ["shared", "gloo"])
def test_who_cannot_see_that_a_peer_is_lost_is_told(exchange):
    """A machine that falls silent closes no connection: the others would wait for it."""
    state, snapshot = _at_rest("shared", 0, exchange)
    serves, fact = step(state, snapshot), snapshot.workers["worker-1"]
    assert not any(isinstance(e, Park) for e in serves.effects)
    seen = replace(snapshot, workers={"worker-1": fact})
    told = [e for e in step(state, seen).effects if isinstance(e, Park)]
    assert told == ([Park("worker-1", 1)] if exchange == "gloo" else [])
    others = (replace(fact, failed="hangs"), replace(fact, parked="a peer was lost"))
    for other in others if exchange == "gloo" else ():
        decided = step(state, replace(seen, workers={"worker-0": other, "worker-1": fact}))
        assert [e for e in decided.effects if isinstance(e, Park)] == [Park("worker-1", 1)]
    for knows in (replace(fact, parked="a peer was lost"), replace(fact, failed="hangs"), replace(fact, serving=7)):
        decided = step(state, replace(seen, workers={"worker-1": knows}))
        assert not any(isinstance(e, Park) for e in decided.effects), knows


def _at_rest(mode: str, standbys: int, exchange: str = "shared") -> tuple[State, Snapshot]:
    layout = make_layout(TWO, exchange, memory_mode=mode)
    record = Record(1, layout, ("worker-0", "worker-1"))
    pools = {
        pool: PoolFact("a", "", {r.key: (0,) * r.pages for r in requests})
        for pool, requests in layout.extents(1).items()
    }
    workers = {
        worker: WorkerFact("a", serving=1, device=seat.device, kv_blocks=layout.kv_blocks(rank))
        for rank, (worker, seat) in enumerate(zip(record.workers, layout.seats, strict=True))
    }
    return State(serving=record, standbys=standbys, next_generation=2, next_worker=2), Snapshot(
        frozenset("a"), pools, workers
    )


@pytest.mark.parametrize(
    ("mode", "standbys", "pools"),
    [
        ("shared", 1, []),
        ("separate", 0, []),
        ("separate", 1, ["device/a/cpu-2"]),
        ("separate", 2, ["device/a/cpu-2", "device/a/cpu-3"]),
    ],
)
def test_standbys_have_a_memory_ready_where_devices_have_their_own(mode, standbys, pools):
    """For the devices that a deployment would get next; empty memories of others are given back."""
    state, snapshot = _at_rest(mode, standbys)
    pages = state.serving.layout.own_pool_pages(Seat("cpu-2", "a"))
    starts = [StartOwner(pool, "a", pages) for pool in pools]
    workers = [StartWorker(f"worker-{2 + k}", "a") for k in range(standbys)]
    assert step(state, snapshot).effects == (*starts, *workers)
    empty, full = PoolFact("a", "", {"ledger": (0,)}), PoolFact("a", "", {"kv/cpu-7": (0,)})
    more = replace(snapshot, pools={**snapshot.pools, "device/a/cpu-7": empty})
    assert step(state, more).effects == (StopOwner("device/a/cpu-7"), *starts, *workers)
    left = replace(snapshot, pools={**snapshot.pools, "device/a/cpu-7": full})
    assert StopOwner("device/a/cpu-7") not in step(state, left).effects


def test_kv_that_an_heir_is_taking_over_keeps_its_size():
    """Its extent has pages by then that it does not map yet: those would be freed."""
    state, snapshot = _at_rest("shared", 0)
    workers = {**snapshot.workers, "worker-0": replace(snapshot.workers["worker-0"], kv_blocks=1)}
    grown = replace(snapshot, workers=workers)
    blocks = state.serving.layout.kv_blocks(0)
    assert step(state, grown).effects == (ResizeKV("worker-0", blocks),)
    assert step(state, replace(grown, busy=frozenset({HandOver("cpu-9", "node/a", "worker-0")}))).effects == ()


def test_nobody_takes_kv_over_while_its_size_changes():
    """What is about to be trimmed is what it does not map yet."""
    state, snapshot = _at_rest("shared", 0)
    pool = snapshot.pools["node/a"]
    left = {**snapshot.pools, "node/a": replace(pool, pages={**pool.pages, "kv/cpu-9": (0,)})}
    waits = replace(snapshot, pools=left)
    (hand_over,) = step(state, waits).effects
    assert isinstance(hand_over, HandOver)
    busy = frozenset({ResizeKV("worker-0", 1)})
    assert step(state, replace(waits, busy=busy)).effects == ()


def test_memory_stands_by_only_where_its_device_may_be():
    state, snapshot = _at_rest("separate", 1)
    entries = (Entry("cpu-0", Kind()), Entry("cpu-1", Kind()), Entry("cpu-2", Kind(), "b"))
    layout = replace(state.serving.layout, inventory=Inventory(entries))
    elsewhere = replace(state, serving=replace(state.serving, layout=layout))
    both = replace(snapshot, nodes=frozenset("ab"))
    assert not any(isinstance(e, StartOwner) for e in step(elsewhere, both).effects)
    here = replace(layout, inventory=Inventory((*entries[:2], Entry("cpu-2", Kind(), "a"))))
    effects = step(replace(state, serving=replace(state.serving, layout=here)), both).effects
    assert [e.pool for e in effects if isinstance(e, StartOwner)] == ["device/a/cpu-2"]


def test_no_standby_starts_while_an_operation_is_under_way():
    """A process that starts takes the cores of those that serve; the operation is done sooner without it."""
    state, snapshot = _at_rest("separate", 1)
    asked = request(state, "scale", "", (make_layout(TWO[:1], "solo", "separate"),), 0.0)
    begun = step(asked, snapshot)
    assert begun.state.pending is not None
    assert not any(isinstance(e, StartWorker | StartOwner) for e in begun.effects)


def _mirrored(layout: Layout) -> Layout:
    """The same with the devices' experts exchanged."""
    replicas = tuple(
        tuple(tuple(replace(r, device=1 - r.device) for r in experts) for experts in layer)
        for layer in layout.placement.replicas_LE
    )
    return replace(layout, placement=Placement(layout.devices, replicas))


@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_an_operation_planned_from_elsewhere_takes_no_memory_that_sequences_need(mode):
    """A node may be lost behind its planning; then what serves holds other experts than it was planned from."""
    state, snapshot = _at_rest(mode, 0)
    assert state.serving is not None
    needed = state.serving.layout.kv_blocks(0)
    here = replace(state.serving.layout, length_blocks=needed, started=(("a", 100),))
    state = replace(state, serving=replace(state.serving, layout=here))
    decided = step(request(state, "scale", "", (_mirrored(here),), 0.0), snapshot).state
    ended = decided.operations[-1]
    if mode == "shared":
        assert decided.pending is not None
    else:
        assert (decided.pending, ended.outcome) == (None, "failed")
        assert ended.reason.startswith("cpu-0 lacks memory to go there from what serves now")
    roomy = replace(state, serving=replace(state.serving, layout=replace(here, length_blocks=1)))
    goal = replace(_mirrored(here), length_blocks=1)
    assert step(request(roomy, "scale", "", (goal,), 0.0), snapshot).state.pending is not None


def test_nothing_is_done_before_what_is_broken_has_recovered():
    """Between two attempts to recover, too."""
    state, snapshot = _at_rest("shared", 0)
    state = replace(state, broken=True, attempts=4, failed_s=0.0)
    asked = request(state, "scale", "2 workers", (state.serving.layout,), 0.0)
    lost = replace(snapshot, workers={"worker-1": snapshot.workers["worker-1"]}, now_s=0.1)
    decided = step(asked, lost)
    assert decided.again_s > 0.1
    assert (decided.state.pending, decided.state.operations[-1].outcome) == (None, "running")


def test_a_node_that_an_operation_has_left_may_go():
    state, snapshot = _at_rest("shared", 0)
    assert state.serving is not None
    goal = state.serving.layout
    both = make_layout([*TWO, ("cpu-2", "b")], "gloo")
    operation = Operation("op-1", "drain", "b", (both, goal), 0.0, committed_s=1.0)
    ended = step(replace(state, operations=(operation,)), snapshot).state.operations[-1]
    assert (ended.outcome, ended.reason) == ("done", "")
    through = replace(
        operation, route=(replace(both, length_blocks=1), replace(goal, length_blocks=1)), committed_s=0.0
    )
    decided = step(replace(state, operations=(through,)), snapshot).state
    assert decided.operations[-1].outcome == "running", "its goal does not need the node: it goes there at once"
    assert decided.pending is not None
    assert decided.pending.record.layout == through.goal
    back = replace(operation, route=(goal, both), committed_s=0.0)
    ended = step(replace(state, operations=(back,)), snapshot).state.operations[-1]
    assert (ended.outcome, ended.reason) == ("failed", "node b is gone")


def test_shared_memory_holds_an_expert_once():
    layout = make_layout(TWO)
    (requests,) = layout.extents(1).values()
    keys = [r.key for r in requests]
    assert len(keys) == len(set(keys))
    assert sum(r.purpose == "experts" for r in requests) == 2 * 3
    separate = make_layout(TWO, memory_mode="separate").extents(1)
    assert set(separate) == {"node/a", "device/a/cpu-0", "device/a/cpu-1"}
    assert sum(r.purpose == "experts" for rs in separate.values() for r in rs) == 2 * 3


@given(SEATS, MODES, ORDERS)
@settings(max_examples=30, deadline=None)
def test_a_layout_is_written_down_without_what_follows_from_it(seats, mode, order):
    layout = make_layout(seats, "gloo", mode, random_placement(order, [device for device, _ in seats]))
    before = pickle.dumps(layout)
    known = [layout.extents(7), layout.pools, *map(layout.kv_blocks, range(len(seats)))]
    assert pickle.dumps(layout) == before
    again = pickle.loads(before)
    assert again == layout
    assert [again.extents(7), again.pools, *map(again.kv_blocks, range(len(seats)))] == known


def test_every_generation_has_an_exchange_of_its_own():
    layout = make_layout(TWO)
    seven, eight = ({r.key for r in layout.extents(n)["node/a"]} for n in (7, 8))
    assert seven ^ eight == {"exchange/7", "exchange/8"}


@given(SEATS, ORDERS)
@settings(max_examples=30, deadline=None)
def test_pools_have_room_for_what_they_must_hold(seats, order):
    """A device's own pool has one size whatever is placed on it, so that a new owner can take it over."""
    for mode in ("shared", "separate"):
        placements = [random_placement(order, [device for device, _ in seats]) for _ in range(2)]
        one, other = (make_layout(seats, memory_mode=mode, placement=placement) for placement in placements)
        for pool, requests in one.extents(1).items():
            assert one.pool_pages(pool) > sum(r.pages for r in requests)
            assert mode == "shared" or pool.startswith("node/") or one.pool_pages(pool) == other.pool_pages(pool)


def _blocks(layout: Layout, pool: str) -> dict[str, int]:
    """KV blocks in a pool by device."""
    there = [rank for rank in range(len(layout.seats)) if layout.device_pool(rank) == pool]
    return {layout.devices[rank]: layout.kv_blocks(rank) for rank in there}


@given(st.sampled_from([1, 2]), st.data())
def test_kv_stays_until_the_switch_where_shared_memory_holds_it(nodes, data):
    """No more KV is there before it than one of the two layouts has; where it would be, that of who stays gives way."""
    layouts = family("shared", nodes)
    old, new = data.draw(st.sampled_from(layouts)), data.draw(st.sampled_from(layouts))
    for pool in set(old.pools) & set(new.pools):
        before, after = _blocks(old, pool), _blocks(new, pool)
        staying = {device for device in before if device in after}
        most = max(_pages(layout, pool, layout) for layout in (old, new))
        fits = _pages(old, pool, new, {**after, **before}) <= most
        expected = before if fits else after
        assert all(new.kv_blocks_coming_from(old, device) == expected[device] for device in staying)
        if nodes == 1 and not set(after) - set(before):
            assert fits  # nobody comes, so nothing needs to be given up
        assert new.kv_coming_from(old, pool) == {**before, **after, **{d: min(before[d], expected[d]) for d in staying}}


def _pages(old: Layout, pool: str, new: Layout, blocks: dict[str, int] | None = None) -> int:
    """Of experts of two layouts in a pool, and of so many blocks or those of the first."""
    experts = {
        key
        for layout in (old, new)
        for rank in range(len(layout.seats))
        if layout.device_pool(rank) == pool
        for key in layout.experts_of(rank)
    }
    kv = sum((blocks or _blocks(old, pool)).values())
    return len(experts) * old.memory.expert_pages + kv * old.memory.kv_block_pages


def test_shrinking_gives_no_kv_up_before_the_switch_where_memory_is_shared():
    state, snapshot = _at_rest("shared", 0)
    more, fewer = node_pages([state.serving.layout, make_layout(TWO[:1], "solo")])
    fewer = replace(fewer, memory=replace(fewer.memory, device_pages=fewer.memory.device_pages - 6))
    assert fewer.kv_blocks(0) < more.kv_blocks(0)
    state = replace(state, serving=replace(state.serving, layout=more))
    asked = request(state, "scale", "", (fewer,), 0.0)
    assert step(asked, snapshot).effects == (Prepare("worker-0", 2),)


def test_nobodys_kv_grows_before_others_have_shrunk():
    """They may need the memory of one another."""
    state, snapshot = _at_rest("shared", 0)
    (zero, one), blocks = snapshot.workers.values(), state.serving.layout.kv_blocks(0)
    workers = {"worker-0": replace(zero, kv_blocks=blocks - 1), "worker-1": replace(one, kv_blocks=blocks + 1)}
    assert step(state, replace(snapshot, workers=workers)).effects == (ResizeKV("worker-1", blocks),)
    workers = {"worker-0": replace(zero, kv_blocks=blocks - 1), "worker-1": one}
    assert step(state, replace(snapshot, workers=workers)).effects == (ResizeKV("worker-0", blocks),)


@pytest.mark.parametrize("again", [{}, {"worker-0": WorkerFact("a")}])
def test_kv_of_a_dead_member_yields_though_another_process_has_its_name(again):
    """A recovery that was withdrawn may have started one; it maps nothing that it could give up."""
    state, snapshot = _at_rest("separate", 0)
    coming = Record(2, make_layout(TWO[:1], "solo", "separate"), ("worker-0",))
    state = replace(state, pending=Pending(coming, Stage.YIELD, recovery=True))
    others = {name: fact for name, fact in snapshot.workers.items() if name != "worker-0"}
    snapshot = replace(snapshot, workers={**others, **again})
    assert list(yields(state, snapshot)) == [Free("device/a/cpu-0", ("kv/cpu-0",))]


def test_kv_of_a_dead_member_stays_whole_where_the_same_layout_comes_again():
    """It may be more than it shall have: what a leaver left to it, or what has not been trimmed yet."""
    state, snapshot = _at_rest("shared", 0)
    pool = snapshot.pools["node/a"]
    more = replace(pool, pages={**pool.pages, "kv/cpu-0": (*pool.pages["kv/cpu-0"], 0, 0)})
    workers = {"worker-1": snapshot.workers["worker-1"]}
    snapshot = replace(snapshot, pools={"node/a": more}, workers=workers)
    again = Record(2, state.serving.layout, ("worker-2", "worker-1"))
    recovering = replace(state, pending=Pending(again, Stage.YIELD, recovery=True))
    assert list(yields(recovering, snapshot)) == []
    other = replace(again, layout=replace(again.layout, exchange_pages=2))
    elsewhere = replace(state, pending=Pending(other, Stage.YIELD, recovery=True))
    assert list(yields(elsewhere, snapshot)) == [Free("node/a", ("kv/cpu-0",))]


def _switching(joiner: WorkerFact) -> tuple[State, Snapshot]:
    """From cpu-0 alone to cpu-0 and cpu-1, everything prepared; the second worker is as given."""
    first, second = node_pages([make_layout(TWO[:1], "solo"), make_layout(TWO)])
    state = State(serving=Record(1, first, ("worker-0",)), next_generation=3)
    state = request(state, "scale", "2 workers", (second,), 0.0)
    coming = Record(2, second, ("worker-0", "worker-1"))
    state = replace(state, pending=Pending(coming, Stage.COMMIT))
    old = WorkerFact("a", frozenset({2}), 1, device="cpu-0", kv_blocks=_yielded(first, second))
    pages = {r.key: (0,) * r.pages for layout, g in ((first, 1), (second, 2)) for r in layout.extents(g)["node/a"]}
    snapshot = Snapshot(frozenset("a"), {"node/a": PoolFact("a", "", pages)}, {"worker-0": old, "worker-1": joiner})
    return state, snapshot


def _yielded(first: Layout, second: Layout) -> int:
    return min(first.kv_blocks(0), second.kv_blocks(0))
