"""What becomes of what is asked for (C13)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from concertina.errors import OperatorError
from concertina.orchestrator.core.facts import Fault, Fill, Prepare
from concertina.orchestrator.core.layout import Layout
from concertina.orchestrator.core.operations import cancel, end, request
from concertina.orchestrator.core.state import Leaving, Stage, State

from .core_rest import check_rest
from .core_schedule import Schedule


@pytest.fixture
def schedule() -> Schedule:
    """A deployment that serves, and in whose world nothing happens by itself."""
    schedule = Schedule(7, faults=False)
    schedule.ask("start", schedule.layouts[:1])
    schedule.settle()
    return schedule


def last(schedule: Schedule) -> tuple[str, str]:
    operation = schedule.state.operations[-1]
    return operation.outcome, operation.reason


def until(schedule: Schedule, stage: Stage) -> None:
    for _ in range(200):
        schedule.turn()
        if schedule.state.pending is not None and schedule.state.pending.stage is stage:
            return
        for effect in list(schedule.world.busy):
            schedule.world.advance(effect)
    raise AssertionError(f"it never came to {stage}")


def serving(schedule: Schedule) -> Layout:
    assert schedule.state.serving is not None
    return schedule.state.serving.layout


def test_the_same_request_is_the_same_operation(schedule: Schedule) -> None:
    schedule.ask("scale", schedule.layouts[9:10])
    once = schedule.state
    assert request(once, "scale", "again", schedule.layouts[9:10], 9.0) is once


def test_a_request_for_the_same_is_the_same_operation_wherever_it_would_lead(schedule: Schedule) -> None:
    state, now_s, (one, other) = schedule.state, schedule.world.now_s, schedule.layouts[9:11]
    drained = request(state, "drain", "a", (one,), now_s, subject="cpu-1")
    again = request(drained, "drain", "b", (other,), now_s, Leaving({"cpu-1": 60.0}), "cpu-1")
    assert again == replace(drained, deadlines={"cpu-1": 60.0})
    for kind, subject in (("drain", "cpu-2"), ("drain", ""), ("scale", "cpu-1")):
        another = request(drained, kind, "c", (other,), now_s, subject=subject)  # type: ignore[arg-type]
        assert [o.outcome for o in another.operations[1:]] == ["superseded", "running"]


def test_what_is_broken_is_not_there_already(schedule: Schedule) -> None:
    asked = request(replace(schedule.state, broken=True), "scale", "", schedule.layouts[:1], 0.0)
    assert asked.operations[-1].outcome == "running"
    schedule.state = asked
    schedule.settle()
    assert last(schedule) == ("done", "")


def test_deadlines_last_as_long_as_devices_leave(schedule: Schedule) -> None:
    """Another one may follow after the commit; whoever is at rest has none."""
    state, now_s = schedule.state, schedule.world.now_s
    drained = request(state, "drain", "cpu-1", schedule.layouts[9:10], now_s, Leaving({"cpu-1": 60.0}))
    again = request(drained, "drain", "cpu-1", schedule.layouts[9:10], now_s, Leaving({"cpu-1": 50.0}))
    followed = request(again, "scale", "2 workers", schedule.layouts[8:9], now_s)
    assert [s.deadlines for s in (drained, again, followed)] == [{"cpu-1": 60.0}, {"cpu-1": 50.0}, {"cpu-1": 50.0}]
    schedule.state = followed
    schedule.settle()
    assert schedule.state.deadlines == {}


def test_a_drained_node_stays_cordoned_unless_its_drain_is_canceled(schedule: Schedule) -> None:
    state, now_s = schedule.state, schedule.world.now_s
    drained = request(state, "drain", "b", schedule.layouts[9:10], now_s, Leaving(node="b"))
    assert drained.cordoned == {"b"}
    assert cancel(drained, drained.operations[-1].id, now_s).cordoned == set()
    followed = request(drained, "scale", "2 workers", schedule.layouts[8:9], now_s)
    assert cancel(followed, followed.operations[-1].id, now_s).cordoned == {"b"}
    again = request(followed, "drain", "b", schedule.layouts[9:10], now_s, Leaving(node="b"))
    assert cancel(again, again.operations[-1].id, now_s).cordoned == {"b"}
    schedule.state = followed
    schedule.settle()
    assert schedule.state.cordoned == {"b"}


def test_a_drain_that_joins_what_is_under_way_is_canceled_with_it(schedule: Schedule) -> None:
    state, now_s = schedule.state, schedule.world.now_s
    scaled = request(state, "scale", "2 workers", schedule.layouts[9:10], now_s, subject="2")
    joined = request(scaled, "drain", "b", schedule.layouts[9:10], now_s, Leaving(node="b"), "b")
    assert joined.operations[-1].id == scaled.operations[-1].id
    assert joined.cordoned == {"b"}
    assert cancel(joined, joined.operations[-1].id, now_s).cordoned == set()


def test_who_stays_after_all_keeps_no_deadline(schedule: Schedule) -> None:
    """Of a drain that is superseded by what serves already."""
    (device, *_), now_s = serving(schedule).devices, schedule.world.now_s
    drained = request(
        schedule.state, "drain", device, schedule.layouts[9:10], now_s, Leaving({device: 9.0, "gone": 9.0})
    )
    stays = request(replace(drained, pending=None), "scale", "as it is", schedule.layouts[:1], now_s)
    assert stays.operations[-1].outcome == "done"
    assert stays.deadlines == {"gone": 9.0}


def test_an_operation_whose_goal_a_recovery_has_left_is_not_done(schedule: Schedule) -> None:
    """A node was lost behind the commit, and is back before the deployment serves without it."""
    schedule.ask("scale", schedule.layouts[-1:])
    schedule.settle()
    assert last(schedule) == ("done", "")
    state = schedule.state
    assert state.serving is not None
    ended, now_s = state.operations[-1], schedule.world.now_s
    again = replace(ended, text="x", outcome="running", route=schedule.layouts[9:10], started_s=now_s, ended_s=0.0)
    assert again.committed_s
    schedule.state = replace(state, operations=(*state.operations[:-1], again), attempts=2, failed_s=now_s)
    schedule.turn()
    assert last(schedule) == ("running", "")
    schedule.settle()
    assert last(schedule) == ("done", "")
    assert serving(schedule) == schedule.layouts[9]


def test_being_there_already_is_done_at_once(schedule: Schedule) -> None:
    schedule.ask("scale", schedule.layouts[:1])
    assert last(schedule) == ("done", "nothing to do")


@pytest.mark.parametrize("stage", [Stage.FILL, Stage.PREPARE])
def test_cancel_before_commit_leaves_everything_as_it_was(schedule: Schedule, stage: Stage) -> None:
    before = serving(schedule)
    schedule.ask("scale", schedule.layouts[-1:])
    until(schedule, stage)
    schedule.state = cancel(schedule.state, schedule.state.operations[-1].id, 1.0)
    schedule.settle()
    assert last(schedule) == ("canceled", "as asked")
    assert serving(schedule) == before
    check_rest(schedule.state, schedule.world, schedule.routes)


def test_cancel_is_refused_once_it_commits(schedule: Schedule) -> None:
    schedule.ask("scale", schedule.layouts[-1:])
    until(schedule, Stage.COMMIT)
    with pytest.raises(OperatorError, match="is being committed"):
        cancel(schedule.state, schedule.state.operations[-1].id, 1.0)
    with pytest.raises(OperatorError, match="'op-99' is unknown; the latest are: op-1, op-2"):
        cancel(schedule.state, "op-99", 1.0)
    schedule.settle()
    with pytest.raises(OperatorError, match="op-2 has ended already"):
        cancel(schedule.state, "op-2", 1.0)


def test_what_waits_for_another_commit_can_be_canceled(schedule: Schedule) -> None:
    schedule.ask("scale", schedule.layouts[-1:])
    until(schedule, Stage.COMMIT)
    schedule.ask("scale", schedule.layouts[9:10])
    schedule.state = cancel(schedule.state, "op-3", 1.0)
    schedule.settle()
    assert [o.outcome for o in schedule.state.operations[1:]] == ["superseded", "canceled"]
    assert serving(schedule) == schedule.layouts[-1]


def test_cancel_is_refused_between_the_generations_of_a_route(schedule: Schedule) -> None:
    """What is there then was asked for by nobody."""
    schedule.ask("scale", (schedule.layouts[-1], schedule.layouts[9]))
    for _ in range(400):
        schedule.turn()
        if serving(schedule) == schedule.layouts[-1]:
            break
        for effect in list(schedule.world.busy):
            schedule.world.advance(effect)
        for generation in schedule.world.running():
            schedule.world.boundary(generation)
    with pytest.raises(OperatorError, match="op-2 is being committed; ask for another size instead"):
        cancel(schedule.state, "op-2", 1.0)
    schedule.settle()
    assert serving(schedule) == schedule.layouts[9]


def test_what_becomes_of_a_later_operation_leaves_deadlines_of_devices_that_have_left(schedule: Schedule) -> None:
    serving = schedule.state.serving
    assert serving is not None
    here, now_s = serving.layout.devices[0], schedule.world.now_s
    state = replace(schedule.state, deadlines={here: 60.0, "cpu-9": 50.0})
    followed = request(state, "scale", "", schedule.layouts[9:10], now_s)
    assert cancel(followed, followed.operations[-1].id, now_s).deadlines == {"cpu-9": 50.0}
    assert end(followed, "failed", "why", now_s).deadlines == {"cpu-9": 50.0}
    assert end(followed, "superseded", "why", now_s).deadlines == state.deadlines
    assert end(followed, "done", "", now_s).deadlines == {}


def test_a_second_request_supersedes_the_first_before_commit(schedule: Schedule) -> None:
    schedule.ask("scale", schedule.layouts[-1:])
    until(schedule, Stage.PREPARE)
    schedule.ask("scale", schedule.layouts[9:10])
    schedule.settle()
    assert [o.outcome for o in schedule.state.operations] == ["done", "superseded", "done"]
    assert serving(schedule) == schedule.layouts[9]


def test_a_second_request_follows_the_first_after_commit(schedule: Schedule) -> None:
    schedule.ask("scale", schedule.layouts[-1:])
    until(schedule, Stage.COMMIT)
    assert schedule.state.pending is not None
    coming = schedule.state.pending.record.id
    schedule.ask("scale", schedule.layouts[9:10])
    assert not schedule.state.pending.doomed
    schedule.settle()
    assert schedule.state.serving is not None
    assert schedule.state.serving.id > coming
    assert serving(schedule) == schedule.layouts[9]


def test_going_back_to_what_serves_ends_too(schedule: Schedule) -> None:
    schedule.ask("scale", schedule.layouts[-1:])
    until(schedule, Stage.FILL)
    schedule.ask("scale", schedule.layouts[:1])
    schedule.settle()
    assert [o.outcome for o in schedule.state.operations] == ["done", "superseded", "done"]


def test_a_route_goes_through_every_layout(schedule: Schedule) -> None:
    way = (schedule.layouts[-1], schedule.layouts[9])
    schedule.ask("scale", way)
    seen = []
    for _ in range(400):
        schedule.turn()
        seen.append(serving(schedule))
        for effect in list(schedule.world.busy):
            schedule.world.advance(effect)
        for generation in schedule.world.running():
            schedule.world.boundary(generation)
    assert list(dict.fromkeys(seen)) == [schedule.layouts[0], *way]
    assert last(schedule)[0] == "done"


@pytest.mark.parametrize("kind", [Fill, Prepare])
@pytest.mark.parametrize("lasting", [False, True])
def test_an_operation_that_keeps_failing_fails_with_its_reason(schedule: Schedule, kind: type, lasting: bool) -> None:
    """Three attempts; one if trying again cannot help. What serves goes on."""
    before = serving(schedule)
    schedule.ask("scale", schedule.layouts[-1:])
    generation = schedule.state.next_generation
    for _ in range(600):
        for effect in schedule.turn():
            if isinstance(effect, kind):
                schedule.world.fail(effect, after=False)
                schedule.world.errors[effect] = Fault("out of pages", lasting)
        if schedule.state.operation is None:
            break
        schedule.world.now_s += 1
        for effect in list(schedule.world.busy):
            schedule.world.advance(effect)
    assert last(schedule) == ("failed", "out of pages")
    assert schedule.state.next_generation - generation == (1 if lasting else 3)
    schedule.settle()
    assert serving(schedule) == before
    check_rest(schedule.state, schedule.world, schedule.routes)


def test_old_operations_are_forgotten() -> None:
    state = State()
    layouts = Schedule(0, faults=False).layouts
    for i in range(120):
        state = request(state, "scale", str(i), (layouts[-(i % 2)],), float(i))
    assert len(state.operations) == 50
    assert state.operations[-1].id == "op-120"
    assert not any(o.route for o in state.operations[:-1])  # else all layouts since the start would be kept
