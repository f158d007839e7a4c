"""How soon what has failed is tried again (C16)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
from concertina.orchestrator.core.facts import Effect, Fill, Prepare, StartOwner, StartWorker
from concertina.orchestrator.core.layout import MemoryMode
from concertina.orchestrator.core.operations import cancel

from .core_layouts import family
from .core_processes import Violation
from .core_rest import check_rest
from .core_schedule import Schedule

TURN_S = 1 / 128  # a binary fraction: times add up exactly
SLACK_S = 6 * TURN_S


class Failing(Schedule):
    """A deployment that serves, in which nothing happens by itself, and effects of some kinds always fail.

    ``pauses_s`` are those between the end of a generation, or the sight of its end, and the next one.
    """

    def __init__(self, *kinds: type, mode: MemoryMode = "shared", first: int = 0) -> None:
        super().__init__(7, faults=False)
        self.use(mode, family(mode, 1))
        self.kinds: tuple[type, ...] = ()
        self.pauses_s, self._waits_s = list[float](), 0.0
        self.ask("start", (self.layouts[first],))
        self.settle()
        self.kinds, self.pauses_s = kinds, []

    def turn(self) -> tuple[Effect, ...]:
        before = self.state
        effects = super().turn()
        for effect in effects:
            if isinstance(effect, self.kinds):
                self.world.fail(effect, after=False)
        ended = before.pending is not None and self.state.pending != before.pending
        if ended or (self.state.broken and not before.broken):
            self._waits_s = self.world.now_s
        if self.state.next_generation > before.next_generation:
            self.pauses_s.append(self.world.now_s - self._waits_s)
        return effects

    def go_on(self, until: Callable[[], bool]) -> None:
        """Some 8 ms for every turn, in which everything that is under way ends."""
        for _ in range(4000):
            self.turn()
            if until():
                return
            for effect in list(self.world.busy):
                self.world.advance(effect)
            for generation in self.world.running():
                self.world.boundary(generation)
            self.world.park_somebody()
            self.world.now_s += TURN_S
        raise AssertionError(f"it never came: {self.state}")

    def put_off(self) -> bool:
        return self.world.now_s < self.opens_s < inf


def roughly(*pauses_s: float) -> list[object]:
    return [pytest.approx(pause_s, abs=SLACK_S) for pause_s in pauses_s]


@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_an_operation_is_tried_again_at_once_then_after_a_second(mode: MemoryMode) -> None:
    schedule = Failing(Fill, mode=mode)
    schedule.ask("scale", schedule.layouts[-1:])
    schedule.go_on(lambda: schedule.state.operation is None)
    assert schedule.state.operations[-1].outcome == "failed"
    assert schedule.pauses_s[1:] == roughly(0.0, 1.0)
    schedule.kinds = ()
    schedule.settle()
    check_rest(schedule.state, schedule.world, schedule.routes)


def test_in_a_pause_nothing_is_done_that_the_next_attempt_would_undo() -> None:
    """KV that has yielded to experts that were to come does not grow between."""
    schedule = Failing(Fill, mode="separate", first=-1)
    blocks = schedule.world.workers["worker-0"].fact().kv_blocks
    schedule.ask("scale", schedule.layouts[:1])
    schedule.go_on(schedule.put_off)
    assert schedule.world.workers["worker-0"].fact().kv_blocks < blocks
    while schedule.world.busy:
        for effect in list(schedule.world.busy):
            schedule.world.advance(effect)
    assert schedule.put_off()
    assert schedule.turn() == ()


@pytest.mark.parametrize("what", ["another", "canceled"])
def test_what_is_asked_for_in_a_pause_does_not_wait(what: str) -> None:
    schedule = Failing(Fill)
    schedule.ask("scale", schedule.layouts[-1:])
    schedule.go_on(schedule.put_off)
    schedule.kinds = ()
    if what == "canceled":
        schedule.state = cancel(schedule.state, schedule.state.operations[-1].id, schedule.world.now_s)
    schedule.ask("scale", schedule.layouts[-1:] if what == "canceled" else schedule.layouts[9:10])
    asked_s = schedule.world.now_s
    schedule.go_on(lambda: schedule.state.pending is not None)
    assert schedule.world.now_s - asked_s <= SLACK_S
    schedule.settle()
    assert schedule.state.operations[-1].outcome == "done"


def test_recovering_is_tried_again_after_pauses_that_double_until_it_is_given_up() -> None:
    schedule = Failing(Prepare)
    schedule.world.now_s += 60
    schedule.world.end_worker(schedule.state.serving.workers[0], noticed=True)
    with pytest.raises(Violation, match="given up: a fault was injected"):
        schedule.go_on(lambda: False)
    assert schedule.pauses_s == roughly(0.0, 0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


def test_a_request_does_not_hurry_a_recovery_that_fails() -> None:
    schedule = Failing(Prepare)
    schedule.world.end_worker(schedule.state.serving.workers[0], noticed=True)
    schedule.go_on(lambda: schedule.state.attempts == 4 and schedule.put_off())
    before = schedule.again_s
    schedule.ask("scale", schedule.layouts[-1:])
    assert schedule.turn() == ()
    assert schedule.again_s == before


def test_generations_that_break_as_soon_as_they_serve_come_after_pauses() -> None:
    schedule = Failing()
    schedule.world.now_s += 60
    served = [0]

    def breaks() -> bool:
        serving = schedule.state.serving
        if schedule.state.pending is None and not schedule.state.broken and serving.id not in served:
            served.append(serving.id)
            schedule.world.break_engine(serving.workers[0])
        return False

    with pytest.raises(Violation, match=r"again and again; the last time: .*its engine failed"):
        schedule.go_on(breaks)
    assert schedule.pauses_s == roughly(0.0, 0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


def test_whoever_lived_for_a_while_is_replaced_at_once() -> None:
    schedule = Failing()
    for _ in range(12):
        schedule.world.now_s += 2
        schedule.world.end_worker(schedule.state.serving.workers[0], noticed=True)
        serving = schedule.state.serving.id
        schedule.go_on(lambda serving=serving: schedule.state.serving.id > serving)  # type: ignore[misc]
    assert schedule.pauses_s == roughly(*[0.0] * 12)


def test_while_what_serves_is_broken_no_standby_starts() -> None:
    schedule = Failing(Prepare)
    schedule.world.end_worker(schedule.state.serving.workers[0], noticed=True)
    schedule.state = replace(schedule.state, standbys=3)
    schedule.go_on(lambda: schedule.state.attempts == 4 and schedule.put_off())
    assert not any(isinstance(effect, StartWorker) for effect in schedule.turn())


class Standing(Failing):
    """One standby is wanted; ``starts_s`` are the moments at which one, or its memory, was started."""

    def __init__(self, *kinds: type, mode: MemoryMode = "shared") -> None:
        self.starts_s = list[float]()
        super().__init__(*kinds, mode=mode)
        self.world.now_s += 600
        self.state = replace(self.state, standbys=1)

    def turn(self) -> tuple[Effect, ...]:
        effects = super().turn()
        if any(isinstance(effect, StartWorker | StartOwner) for effect in effects):
            self.starts_s.append(self.world.now_s)
        return effects

    def idle(self) -> str:
        """The standby, if there is one."""
        return next((name for name, worker in self.world.workers.items() if worker.fact().idle), "")

    def gaps_s(self) -> list[float]:
        return [later - first for first, later in pairwise(self.starts_s)]

    def starts(self, count: int) -> None:
        """Go on until there were so many starts more; what is put off comes at once."""
        self.starts_s.clear()

        def enough() -> bool:
            if self.state.pending is None and not self.world.busy and self.again_s < inf:
                self.world.now_s = max(self.world.now_s, self.again_s - TURN_S)
            return len(self.starts_s) == count

        self.go_on(enough)


@pytest.mark.parametrize(("kind", "mode"), [(StartWorker, "shared"), (StartOwner, "separate")])
def test_standbys_that_never_start_are_tried_after_pauses_that_double_up_to_a_minute(
    kind: type, mode: MemoryMode
) -> None:
    schedule = Standing(kind, mode=mode)
    schedule.starts(12)
    assert schedule.gaps_s()[:9] == roughly(0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0)


def test_standbys_that_end_soon_are_replaced_after_pauses_others_at_once() -> None:
    schedule = Standing()
    for _ in range(5):
        schedule.starts(1)
        schedule.go_on(lambda: not schedule.world.busy)
        schedule.world.end_worker(schedule.idle(), noticed=True)
    ended_s = schedule.world.now_s
    schedule.starts(1)
    assert schedule.starts_s == roughly(ended_s + 8.0)
    schedule.go_on(lambda: not schedule.world.busy)
    schedule.world.now_s += 200
    schedule.world.end_worker(schedule.idle(), noticed=True)
    ended_s = schedule.world.now_s
    schedule.starts(1)
    assert schedule.starts_s == roughly(ended_s)


def test_a_change_does_not_wait_for_standbys_that_fail_and_new_ones_follow_it_at_once() -> None:
    schedule = Standing(StartWorker)
    schedule.starts(8)
    schedule.go_on(lambda: not schedule.world.busy and schedule.again_s < inf)
    schedule.kinds = ()
    schedule.starts_s.clear()
    asked_s = schedule.world.now_s
    schedule.ask("scale", schedule.layouts[-1:])
    schedule.go_on(lambda: schedule.state.operation is None and not schedule.world.busy)
    schedule.go_on(lambda: schedule.idle() != "")
    assert schedule.state.operations[-1].outcome == "done"
    assert schedule.world.now_s - asked_s < 2.0
