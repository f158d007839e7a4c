"""Engines of several members: equal numbers of steps, sleep, changes at one boundary, lost peers, leaving (G8, G12)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from concertina.errors import InternalError, PeerLost
from concertina.workers.engine.engine import Engine
from concertina.workers.engine.lockstep import NOTHING, Offer, Retire, Row, Swap
from concertina.workers.model.batch import Batch

from .fakes import Collected, FakeDecoder, FakeKV, Hub, ThreadExchange, config, expected_greedy, request

PROMPT = [4, 2, 7]


@dataclass
class Member:
    """An engine in a thread, and what became of it."""

    engine: Engine
    exchange: ThreadExchange
    collected: Collected = field(default_factory=Collected)
    end: str | None = None
    error: BaseException | None = None
    thread: threading.Thread | None = None

    def start(self) -> None:
        self.end = self.error = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def join(self) -> None:
        assert self.thread is not None
        self.thread.join(20)
        assert not self.thread.is_alive(), "the loop does not end"

    def _run(self) -> None:
        try:
            self.end = self.engine.run(self.collected.emit)
        except Exception as e:  # noqa: BLE001 - the test looks at it
            self.error = e


def decoder_for(exchange: ThreadExchange) -> FakeDecoder:
    """Its forward pass meets all peers, as the expert exchange does: unequal numbers of passes would hang."""
    return FakeDecoder(hook=lambda batch: exchange.meet_in_layer())


def member(exchange: ThreadExchange) -> Member:
    return Member(Engine(decoder_for(exchange), FakeKV(40), exchange, config()), exchange)


@contextmanager
def running(count: int) -> Iterator[list[Member]]:
    members = [member(exchange) for exchange in Hub(count).members()]
    for m in members:
        m.start()
    try:
        yield members
    finally:
        for m in members:
            m.exchange.die()
        for m in members:
            m.join()


def finish(members: Sequence[Member]) -> None:
    members[0].engine.stop()
    for m in members:
        m.join()
        assert (m.end, m.error) == ("stopped", None)


@pytest.mark.parametrize("count", [2, 3])
def test_members_step_together_whoever_has_work(count: int) -> None:
    with running(count) as members:
        for i in range(12):
            members[i * i % count].engine.submit(request(str(i), [i % 10, *PROMPT], max_tokens=4 + i))
        for i in range(12):
            m = members[i * i % count]
            m.collected.wait_for(lambda m=m, i=i: str(i) in m.collected.ends)
            assert m.collected.tokens[str(i)] == expected_greedy([i % 10, *PROMPT], 4 + i)
        finish(members)
        assert len({m.exchange.gathers for m in members}) == 1
        assert len({m.engine.stats.steps for m in members}) == 1


def test_idle_members_sleep_and_one_request_wakes_all() -> None:
    with running(2) as members:
        members[0].engine.submit(request("a", PROMPT))
        members[0].collected.wait_for(lambda: "a" in members[0].collected.ends)
        members[1].engine.submit(request("b", PROMPT))
        members[1].collected.wait_for(lambda: "b" in members[1].collected.ends)
        finish(members)
        assert all(m.exchange.waits > 0 for m in members)
        assert members[0].engine.stats.steps == members[1].engine.stats.steps == 10


def test_an_abort_of_the_last_request_is_reported_while_idle() -> None:
    with running(2) as members:
        (first, _) = members
        first.engine.submit(request("a", PROMPT, max_tokens=60))
        first.collected.wait_for(lambda: len(first.collected.tokens.get("a", [])) > 2)
        first.engine.abort("a")
        first.collected.wait_for(lambda: "a" in first.collected.ends)
        assert first.engine.load.kv_blocks_used == 0
        finish(members)


def swap(generation: int, exchange: ThreadExchange) -> Swap:
    return Swap(generation, decoder_for(exchange), exchange)


def test_a_generation_grows_and_shrinks_under_running_requests() -> None:
    with running(1) as (first,):
        boundaries: list[int] = []
        first.engine.on_boundary = lambda rows: boundaries.append(len(rows))
        first.engine.submit(request("a", PROMPT, max_tokens=60))
        first.collected.wait_for(lambda: len(first.collected.tokens.get("a", [])) > 5)
        grown = Hub(2).members()
        second = member(grown[1])
        second.start()  # it waits for the first at the new exchange
        first.engine.offer(swap(1, grown[0]))
        second.engine.submit(request("b", PROMPT, max_tokens=60))
        second.collected.wait_for(lambda: len(second.collected.tokens.get("b", [])) > 5)
        assert first.engine.generation == 1
        (shrunk,) = Hub(1).members()
        second.engine.offer(swap(2, shrunk))
        first.engine.offer(Retire(2))
        first.join()
        assert (first.end, first.error) == ("retired", None)
        second.collected.wait_for(lambda: "b" in second.collected.ends)
        assert second.engine.generation == 2
        assert second.collected.tokens["b"] == expected_greedy(PROMPT, 60)
        second.exchange = shrunk
        finish([second])
        got = first.collected.tokens["a"]
        assert got == expected_greedy(PROMPT, 60)[: len(got)]
        assert len(got) > 5
        assert {1, 2} <= set(boundaries)


def test_nothing_is_swapped_until_all_are_ready_and_offers_can_be_withdrawn() -> None:
    with running(2) as members:
        first, second = members
        new = Hub(2).members()
        first.engine.offer(swap(5, new[0]))
        first.engine.submit(request("a", PROMPT, max_tokens=30))
        first.collected.wait_for(lambda: "a" in first.collected.ends)
        assert (first.engine.generation, second.engine.generation) == (0, 0)
        with pytest.raises(InternalError, match="generation 6 offered while 5 is on offer"):
            first.engine.offer(swap(6, new[0]))
        assert first.engine.withdraw(5)
        assert not first.engine.withdraw(5)
        second.engine.offer(swap(5, new[1]))
        first.engine.submit(request("b", PROMPT, max_tokens=30))
        first.collected.wait_for(lambda: "b" in first.collected.ends)
        assert (first.engine.generation, second.engine.generation) == (0, 0)
        first.engine.offer(swap(5, new[0]))
        first.engine.submit(request("c", PROMPT, max_tokens=30))
        first.collected.wait_for(lambda: "c" in first.collected.ends)
        assert (first.engine.generation, second.engine.generation) == (5, 5)
        assert not first.engine.withdraw(5)
        for m, exchange in zip(members, new, strict=True):
            m.exchange = exchange
        finish(members)


def test_a_lost_peer_ends_the_loop_and_recovery_loses_no_token() -> None:
    with running(2) as members:
        first, second = members
        first.engine.submit(request("a", PROMPT, max_tokens=60))
        first.collected.wait_for(lambda: len(first.collected.tokens.get("a", [])) > 3)
        second.exchange.die()
        for m in members:
            m.join()
            assert isinstance(m.error, PeerLost)
        assert first.engine.load.running == 1
        first.engine.submit(request("b", PROMPT))  # accepted while nobody serves
        (alone,) = Hub(1).members()
        first.engine.recover(swap(1, alone))
        first.exchange = alone
        first.start()
        first.collected.wait_for(lambda: {"a", "b"} <= set(first.collected.ends))
        assert first.collected.tokens["a"] == expected_greedy(PROMPT, 60)
        assert first.collected.tokens["b"] == expected_greedy(PROMPT, 5)
        finish([first])


def hold_after(m: Member, passes: int) -> threading.Event:
    """Its next forward pass after so many waits until the event is set."""
    decoder, event = m.engine._decoder, threading.Event()
    assert isinstance(decoder, FakeDecoder)

    def hook(batch: Batch) -> None:
        assert decoder.passes < passes or event.wait(20)
        m.exchange.meet_in_layer()

    decoder.hook = hook
    return event


@pytest.mark.parametrize("how", ["agreed", "lost its peer"])
def test_an_engine_that_leaves_hands_all_its_sequences_over(how: str) -> None:
    with running(2) as members:
        first, second = members
        go_on = hold_after(first, 4)
        first.engine.submit(request("a", PROMPT, max_tokens=60))
        first.collected.wait_for(lambda: len(first.collected.tokens.get("a", [])) == 4)
        with pytest.raises(InternalError, match="is running already"):
            first.engine.hand_over("x")
        if how == "agreed":
            (shrunk,) = Hub(1).members()
            second.engine.offer(swap(4, shrunk))
            first.engine.offer(Retire(4))
            go_on.set()
            first.join()
            assert (first.end, first.error) == ("retired", None)
            assert first.engine.generation == 0
            second.exchange = shrunk
            finish([second])
        else:
            second.exchange.die()
            go_on.set()
            first.join()
            with pytest.raises(InternalError, match="has not retired"):
                first.engine.hand_over("x")
            first.engine.retire()
        first.engine.submit(request("b", PROMPT))
        first.engine.submit(request("c", PROMPT))
        first.engine.abort("c")
        outputs = {output.id: output for output in first.engine.hand_over("cpu:1")}
        first.collected.emit(list(outputs.values()))
        assert {name: (o.finish_reason, o.moved_to) for name, o in outputs.items()} == {
            "a": ("moved", "cpu:1"),
            "b": ("moved", "cpu:1"),
            "c": ("abort", ""),
        }
        first.engine.submit(request("late", PROMPT))
        assert first.collected.ends["late"].moved_to == "cpu:1"
        assert first.engine.hand_over("cpu:2") == []
        assert first.engine.load.kv_blocks_used == 0
        for misuse in (first.engine.step, lambda: first.engine.recover(swap(5, first.exchange))):
            with pytest.raises(InternalError, match="has retired"):
                misuse()


def test_an_engine_that_never_ran_cannot_say_that_a_request_has_moved() -> None:
    engine = member(Hub(1).members()[0]).engine
    engine.retire()
    assert engine.hand_over("") == []
    with pytest.raises(InternalError, match="'a' has moved, and this engine never ran"):
        engine.submit(request("a", PROMPT))


def test_a_loop_runs_once() -> None:
    with running(1) as (only,):
        only.engine.submit(request("a", PROMPT, max_tokens=3))
        only.collected.wait_for(lambda: "a" in only.collected.ends)
        with pytest.raises(InternalError, match="is running already"):
            only.engine.step()
        with pytest.raises(InternalError, match="is running already"):
            only.engine.recover(swap(1, only.exchange))
        finish([only])
        only.start()  # a stop counts once
        only.engine.submit(request("b", PROMPT, max_tokens=3))
        only.collected.wait_for(lambda: "b" in only.collected.ends)
        finish([only])


def test_an_error_of_emit_reaches_the_caller() -> None:
    def broken(outputs: object) -> None:
        raise RuntimeError("no one listens")

    (exchange,) = Hub(1).members()
    engine = Engine(FakeDecoder(), FakeKV(8), exchange, config())
    engine.submit(request("a", PROMPT))
    with pytest.raises(RuntimeError, match="no one listens"):
        engine.run(broken)


def test_an_idle_worker_runs_with_no_tokens() -> None:
    sizes: list[int] = []

    def note(exchange: ThreadExchange, batch: Batch) -> None:
        sizes.append(batch.tokens)
        exchange.meet_in_layer()

    with running(2) as members:
        decoder = members[1].engine._decoder
        assert isinstance(decoder, FakeDecoder)
        decoder.hook = lambda batch: note(members[1].exchange, batch)
        members[0].engine.submit(request("a", PROMPT, max_tokens=4))
        members[0].collected.wait_for(lambda: "a" in members[0].collected.ends)
        finish(members)
    assert sizes == [0, 0, 0, 0]


def test_offers_are_judged_by_everyones_rows() -> None:
    offer = Offer()
    assert offer.judge([Row(0, 0, NOTHING)]) is None
    with pytest.raises(InternalError, match="negative"):
        offer.make(Retire(-2))
    offer.make(Retire(4))
    assert offer.generation == 4
    assert offer.judge([Row(1, 0, 4), Row(0, 0, 3)]) is None
    assert offer.judge([Row(1, 0, 4), Row(0, 0, 4)]) == Retire(4)
    assert offer.generation == NOTHING
