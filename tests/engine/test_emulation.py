"""Emulated steps: what a forward pass does not take is slept, with a clock and a sleep of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from concertina.errors import OperatorError, PeerLost
from concertina.workers.engine.engine import Engine
from concertina.workers.engine.lockstep import Swap
from concertina.workers.model.batch import Batch

from .fakes import Collected, FakeDecoder, FakeKV, Hub, ThreadExchange, config, drain, expected_greedy, request

PROMPT = [1, 2, 3]


@dataclass
class FakeTime:
    """Passes only in forward passes and sleeps, by whole seconds, which are exact."""

    now_s: float = 100.0
    slept_s: list[float] = field(default_factory=list)
    then: Callable[[], None] = lambda: None

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds
        self.then()

    def takes(self, *seconds: float) -> Callable[[Batch], None]:
        """A decoder's hook: passes take so long one after the other, and the last ones all the same."""
        left = list(seconds)

        def hook(batch: Batch) -> None:
            self.now_s += left.pop(0) if len(left) > 1 else left[0]

        return hook


def engine_of(
    time: FakeTime, emulated_step_ms: float, *pass_s: float, exchange: ThreadExchange | None = None
) -> Engine:
    exchange = exchange or Hub(1).members()[0]
    decoder = FakeDecoder(hook=time.takes(*pass_s))
    setting = replace(config(), emulated_step_ms=emulated_step_ms)
    return Engine(decoder, FakeKV(64), exchange, setting, clock=time.clock, sleep=time.sleep)


def test_exactly_the_missing_time_is_slept_before_the_step_ends() -> None:
    time = FakeTime()
    engine = engine_of(time, 5000.0, 1.0, 2.0, 4.0)
    engine.submit(request("a", PROMPT, max_tokens=3))
    drain(engine, Collected())
    assert (sum(time.slept_s), max(time.slept_s)) == (8.0, 1 / 64), "in slices, to notice who dies"
    assert list(engine.step_ends_s) == [105.0, 110.0, 115.0]
    assert (engine.stats.steps, engine.stats.step_seconds) == (3, 15.0)


def test_a_peer_that_dies_meanwhile_is_noticed_before_the_step_ends() -> None:
    time = FakeTime()
    (exchange,) = Hub(1).members()
    engine = engine_of(time, 5000.0, 1.0, exchange=exchange)
    engine.submit(request("a", PROMPT, max_tokens=6))
    collected = Collected()
    collected.emit(engine.step())
    time.then = lambda: exchange.die() if time.now_s > 107.0 else None
    with pytest.raises(PeerLost):
        engine.step()
    assert 107.0 < time.now_s < 107.1, "a pass of one second and four of sleep would have ended at 110"
    time.then = lambda: None
    engine.recover(Swap(2, FakeDecoder(), Hub(1).members()[0]))
    drain(engine, collected)
    assert collected.tokens["a"] == expected_greedy(PROMPT, 6), "that step is made once more"


@pytest.mark.parametrize("pass_s", [5.0, 7.0])
def test_a_step_that_takes_as_long_or_longer_is_left_alone(pass_s: float) -> None:
    time = FakeTime()
    engine = engine_of(time, 5000.0, pass_s)
    engine.submit(request("a", PROMPT, max_tokens=3))
    drain(engine, Collected())
    assert time.slept_s == []
    assert engine.stats.step_seconds == 3 * pass_s


def test_zero_never_sleeps() -> None:
    time = FakeTime()
    engine = engine_of(time, 0.0, 0.0)
    engine.submit(request("a", PROMPT, max_tokens=3))
    drain(engine, Collected())
    assert (engine.stats.steps, time.slept_s) == (3, [])


def test_idle_rounds_and_boundaries_are_not_slowed() -> None:
    time = FakeTime()
    engine = engine_of(time, 5000.0, 1.0)
    engine.step()
    (exchange,) = Hub(1).members()
    engine.offer(Swap(3, FakeDecoder(), exchange))
    engine.step()
    engine.resize([], 60)
    assert engine.generation == 3
    assert (time.now_s, time.slept_s) == (100.0, [])


@pytest.mark.parametrize("emulated_step_ms", [0.0, 5000.0])
def test_tokens_are_the_same(emulated_step_ms: float) -> None:
    engine = engine_of(FakeTime(), emulated_step_ms, 1.0)
    for number in range(3):
        engine.submit(request(f"r{number}", [*PROMPT, number], max_tokens=8))
    collected = drain(engine, Collected())
    for number in range(3):
        assert collected.tokens[f"r{number}"] == expected_greedy([*PROMPT, number], 8)


@pytest.mark.parametrize("emulated_step_ms", [-1.0, float("nan"), float("inf")])
def test_what_is_no_time_is_refused(emulated_step_ms: float) -> None:
    with pytest.raises(OperatorError, match=f"emulated_step_ms: {emulated_step_ms}; expected a finite number"):
        replace(config(), emulated_step_ms=emulated_step_ms)
