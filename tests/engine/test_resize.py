"""Blocks come and go under running requests, and what is asked from outside happens at a boundary (G3, G4, G6, G11)."""

from __future__ import annotations

import threading
import time

import pytest
from concertina.errors import InternalError
from concertina.workers.engine.engine import Engine
from concertina.workers.engine.turns import Turns
from concertina.workers.kv.ledger import ROOT, BlockRecord
from concertina.workers.model.batch import Batch
from hypothesis import given, settings
from hypothesis import strategies as st

from .fakes import Collected, FakeDecoder, FakeKV, Hub, Stores, config, drain, expected_greedy, request, solo

PROMPT = [4, 2, 7]
MOST = 60


@settings(max_examples=80, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=10), min_size=1, max_size=4),
    sizes=st.lists(st.tuples(st.sets(st.integers(0, MOST - 1), max_size=30), st.integers(9, 40)), max_size=8),
    steps=st.integers(0, 4),
)
def test_answers_do_not_depend_on_how_the_cache_changes(
    prompts: list[list[int]], sizes: list[tuple[set[int], int]], steps: int
) -> None:
    kv = FakeKV(12, 2, ledger=Stores(2 * MOST, 2).ledger())
    engine = solo(kv, setting=config(max_batched_tokens=9))
    collected = Collected()
    for i, prompt in enumerate(prompts):
        engine.submit(request(str(i), prompt, max_tokens=8))
    for blocks, target in sizes:
        for _ in range(steps):
            collected.emit(engine.step())
        fresh = blocks - kv.mapped
        total = len(kv.mapped) + len(fresh)
        kv.mapped |= fresh
        parted = engine.resize(sorted(fresh), target)
        kv.mapped -= set(parted)
        assert len(kv.mapped) == min(target, total) == engine.load.kv_blocks
    drain(engine, collected)
    for i, prompt in enumerate(prompts):
        assert collected.tokens[str(i)] == expected_greedy(prompt, 8)


def test_shrinking_sends_the_latest_back_and_keeps_what_was_computed() -> None:
    engine = solo(24)
    for name in "abc":
        engine.submit(request(name, [ord(name) % 9, *PROMPT], max_tokens=6))
    collected = Collected()
    collected.emit(engine.step())
    assert (engine.load.running, engine.load.kv_blocks_used) == (3, 6)
    assert len(engine.resize([], 5)) == 19
    assert (engine.load.running, engine.load.waiting, engine.stats.preemptions) == (2, 1, 1)
    drain(engine, collected)
    assert engine.load.kv_blocks == 5
    for name in "abc":
        assert collected.tokens[name] == expected_greedy([ord(name) % 9, *PROMPT], 6)


def test_giving_up_preempts_nobody() -> None:
    engine = solo(10)
    for name in "ab":
        engine.submit(request(name, [ord(name) % 9, *PROMPT], max_tokens=8))
    collected = Collected()
    for _ in range(3):
        collected.emit(engine.step())
    used = engine.load.kv_blocks_used
    kv = engine._kv
    assert isinstance(kv, FakeKV)
    kv.mapped |= {77, 78}
    engine.take_in([(77, None), (78, None)])
    assert set(engine.give_up(2)) >= {77, 78}
    assert engine.load.kv_blocks == engine.load.kv_blocks_used == used
    assert (engine.load.running, engine.stats.preemptions) == (2, 0)


def test_reserving_leaves_room_for_everyone_here() -> None:
    engine = solo(10)
    engine.submit(request("a", PROMPT, max_tokens=10))  # 6 blocks at most
    reserved = engine.reserve(100)
    assert len(reserved) == 4
    assert not set(engine.resize([], 3)) & set(reserved)
    assert (engine.load.kv_blocks, engine.load.waiting) == (4, 0), "it cannot stay, but what is reserved does"
    engine.give_back([(block, None) for block in reserved])
    assert engine.load.kv_blocks_used == 0


@given(blocks=st.integers(1, 12), used=st.integers(0, 12), unused=st.integers(0, 30), target=st.integers(0, 40))
def test_what_is_adopted_takes_its_part_of_the_room(blocks: int, used: int, unused: int, target: int) -> None:
    """And what sequences use comes before what they do not."""
    engine = solo(12)
    for i in range(blocks):
        engine.submit(request(str(i), [i % 10, i // 10], max_tokens=1))
    drain(engine, Collected())
    cached = engine._core.scheduler.blocks.cached_blocks
    assert cached == blocks
    count = engine.worth_adopting(used, unused, target)
    assert min(used, target) <= count <= used + unused
    assert count == used + unused or count <= target
    if used + unused + cached > target >= used:
        both, left = unused + cached, target - used
        assert (count - used) * both <= left * unused < (count - used + 1) * both
    elif target >= used:
        assert count == used + unused


def test_what_is_waited_for_goes_last() -> None:
    engine = solo(12, setting=config(max_running=1))
    for name, first in (("a", 1), ("b", 2), ("c", 3)):
        engine.submit(request(name, [first, *PROMPT, *PROMPT], max_tokens=1))
        drain(engine, Collected())
    blocks = engine._core.scheduler.blocks
    engine.submit(request("runs", [5], max_tokens=3))
    engine.step()
    engine.submit(request("again", [1, *PROMPT, *PROMPT, 6], max_tokens=1))  # finds what is oldest
    wanted = blocks.found([1, *PROMPT, *PROMPT, 6])
    assert len(wanted) == 3
    assert list(blocks._idle)[:3] == wanted[::-1]
    engine.keep_awaited()
    parted = engine.resize([], 10)
    assert len(parted) == 2
    most = engine.unused_besides(())
    assert most - engine.unused_besides([*range(100)]) == blocks.cached_blocks - len(wanted)
    reserved = engine.reserve(12)
    assert len(reserved) == most >= 5
    assert blocks.available == len(wanted)
    assert not set(wanted) & {*parted, *reserved}
    engine.give_back([(block, BlockRecord(ROOT, (block, 10))) for block in reserved])
    engine.keep_no_more()
    assert list(blocks._idle)[-3:] == wanted[::-1]
    collected = drain(engine, Collected())
    assert collected.tokens["again"] == expected_greedy([1, *PROMPT, *PROMPT, 6], 1)


def test_calls_are_served_between_steps_and_their_errors_come_back() -> None:
    (exchange,) = Hub(1).members()
    passing = threading.Event()
    where: list[object] = []

    def hook(batch: object) -> None:
        passing.set()
        time.sleep(0.002)
        passing.clear()

    engine = Engine(FakeDecoder(hook=hook), FakeKV(60), exchange, config(idle_wait_s=30.0))
    collected = Collected()
    loop = threading.Thread(target=engine.run, args=(collected.emit,), daemon=True)

    def look() -> str:
        where.append(threading.current_thread())
        assert not passing.is_set()
        return "seen" if engine.reserve(0) == [] else "not seen"  # a call within a call

    assert engine.call(look) == "seen"
    assert where == [threading.current_thread()]
    loop.start()
    try:
        engine.submit(request("a", PROMPT, max_tokens=50))
        for _ in range(10):
            assert engine.call(look) == "seen"
        collected.wait_for(lambda: "a" in collected.ends)
        time.sleep(0.02)  # asleep for half a minute
        assert engine.call(look) == "seen"
        assert set(where[1:]) == {loop}
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda: 1 // 0)
        with pytest.raises(InternalError, match="cannot run within a call"):
            engine.call(engine.step)
        assert len(engine.resize([], 50)) == 10
    finally:
        engine.stop()
        loop.join(20)
    assert engine.call(look) == "seen"
    assert collected.tokens["a"] == expected_greedy(PROMPT, 50)


def test_the_times_of_the_last_passes_are_kept() -> None:
    (exchange,) = Hub(1).members()
    now = [5.0]

    def hook(batch: object) -> None:
        now[0] += 2.0

    engine = Engine(FakeDecoder(hook=hook), FakeKV(9), exchange, config(), clock=lambda: now[0])
    assert (list(engine.step_ends_s), engine.step_s) == ([], 0.0)
    engine.submit(request("a", PROMPT, max_tokens=2))
    drain(engine, Collected())
    now[0] = 100.0
    engine.step()
    assert (list(engine.step_ends_s), engine.step_s) == ([7.0, 9.0], 2.0)


def test_many_callers_and_loops_take_turns() -> None:
    """Nobody is inside with another one, nobody is forgotten, and loops may end at any time."""
    turns, inside, done = Turns(), [0], [0]

    def alone() -> None:
        inside[0] += 1
        assert inside[0] == 1
        time.sleep(0)
        done[0] += 1
        inside[0] -= 1

    def caller() -> None:
        for _ in range(100):
            turns.call(alone, lambda: None)

    callers = [threading.Thread(target=caller, daemon=True) for _ in range(4)]
    for thread in callers:
        thread.start()
    while any(thread.is_alive() for thread in callers):
        with turns.loop():
            for _ in range(3):
                turns.serve()
    assert done == [400]


@pytest.mark.parametrize("aborted", [False, True])
def test_reserving_waits_for_no_step_but_where_that_may_write_what_is_free(aborted: bool) -> None:
    """The pass that is being made writes the blocks of a sequence that is given up meanwhile."""
    inside, go_on, got = threading.Event(), threading.Event(), threading.Event()
    passes: list[list[int]] = []
    reserved: list[int] = []

    def hook(batch: Batch) -> None:
        passes.append([block for table in batch.block_tables for block in table])
        if len(passes) == 2:
            inside.set()
            assert go_on.wait(20)

    (exchange,) = Hub(1).members()
    engine = Engine(FakeDecoder(hook=hook), FakeKV(8), exchange, config(idle_wait_s=30.0))
    collected = Collected()
    loop = threading.Thread(target=engine.run, args=(collected.emit,), daemon=True)

    def reserve() -> None:
        reserved.extend(engine.reserve(100))
        got.set()

    engine.submit(request("a", PROMPT, max_tokens=9))
    loop.start()
    try:
        assert inside.wait(20)
        if aborted:
            engine.abort("a")
        threading.Thread(target=reserve, daemon=True).start()
        assert got.wait(0.2 if aborted else 20) != aborted, "it has to wait for the boundary, and only then"
        if not aborted:
            engine.give_back([(block, None) for block in reserved])
        go_on.set()
        assert got.wait(20)
        assert len(reserved) == (8 if aborted else 2)
        assert aborted or not set(reserved) & set(passes[1])
        collected.wait_for(lambda: "a" in collected.ends)
        assert aborted or collected.tokens["a"] == expected_greedy(PROMPT, 9)
        if aborted:
            engine.give_back([(block, None) for block in reserved])
        assert (engine.load.kv_blocks, engine.load.kv_blocks_used) == (8, 0)
    finally:
        go_on.set()
        engine.stop()
        loop.join(20)
