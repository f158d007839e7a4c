"""Dead, hung and departing members: everyone else raises PeerLost, at once where it can be known (X2, X3)."""

from __future__ import annotations

import signal
import threading
import time
from array import array
from collections.abc import Callable
from math import inf

import pytest
import torch
from concertina.errors import InternalError, PeerLost
from concertina.workers.exchange.base import Exchange
from concertina.workers.exchange.mailbox import Head
from concertina.workers.exchange.shared import SharedMemoryExchange
from concertina.workers.exchange.solo import SoloExchange

from .crew import Crew, Region, run_threads

KINDS = ("shared", "gloo")


def _check(crew: Crew, kind: str, victim: int, word: str) -> None:
    survivors = [r for r in range(len(crew.members)) if r != victim]
    for rank, reason, poisoned in crew.answers(survivors):
        assert rank == (victim if kind == "shared" else -1)
        assert poisoned, "a later call did not raise the same"
        if kind == "shared":
            assert word in reason


@pytest.mark.ray
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "victim"), [(2, 0), (4, 2)])
def test_killed(crew: Crew, kind: str, size: int, victim: int) -> None:
    """The time-out is longer than a member may take to answer here, so it cannot be what told them."""
    crew.join(kind, size, timeout_s=150.0, capacity=4096)
    crew.start("until_lost", rows=40)  # several rounds a message
    time.sleep(0.2)
    crew.members[victim].signal(signal.SIGKILL)
    _check(crew, kind, victim, "process ended")
    crew.lose(victim)
    crew.leave()


@pytest.mark.ray
@pytest.mark.parametrize("kind", KINDS)
def test_stopped(crew: Crew, kind: str) -> None:
    crew.join(kind, 3, timeout_s=2.0)
    crew.start("until_lost")
    time.sleep(0.2)
    crew.members[1].signal(signal.SIGSTOP)
    _check(crew, kind, 1, "no sign of life for 2 s")
    crew.members[1].signal(signal.SIGCONT)
    (lost,) = crew.answers([1])
    assert lost[0] == (1 if kind == "shared" else -1), "the hung member learns that it was given up"
    crew.leave()


@pytest.mark.ray
@pytest.mark.parametrize("kind", KINDS)
def test_told_of_a_silent_member(crew: Crew, kind: str) -> None:
    """Nothing shows in the exchange for two and a half minutes, and nobody waits for these to leave it either."""
    crew.join(kind, 3, timeout_s=150.0)
    crew.start("until_lost", told_s=1.0)
    time.sleep(0.2)
    crew.members[1].signal(signal.SIGSTOP)
    for rank, reason, poisoned in crew.answers([0, 2]):
        assert (rank, reason, poisoned) == (-1, "so it was told", True)
    for member in (0, 2):
        crew.members[member].send("leave", {})
    crew.answers([0, 2])
    crew.members[1].signal(signal.SIGCONT)
    crew.answers([1])
    crew.leave()


@pytest.mark.ray
@pytest.mark.parametrize("what", ["idle_until_lost", "look_until_lost"])
def test_killed_while_all_sleep(crew: Crew, what: str) -> None:
    crew.join("shared", 3, timeout_s=150.0)
    crew.start(what)
    time.sleep(0.2)
    crew.members[0].signal(signal.SIGKILL)
    _check(crew, "shared", 0, "process ended")
    crew.lose(0)
    crew.leave()


@pytest.mark.ray
@pytest.mark.parametrize("kind", KINDS)
def test_slow_is_not_hung(crew: Crew, kind: str) -> None:
    """Together the pauses are longer than the time-out, each alone is not; all go on until one is killed."""
    crew.join(kind, 3, timeout_s=3.0)
    crew.start("until_lost", nap_s=0.7)
    time.sleep(4.0)
    crew.members[2].signal(signal.SIGKILL)
    _check(crew, kind, 2, "process ended")
    crew.lose(2)
    crew.leave()


def test_stuck_members_are_not_blamed() -> None:
    """Rank 2 hangs after it has sent to 0 only. So 0 goes on and then waits for 1, which waits for 2: both name 2."""

    def work(ex: Exchange) -> list[int] | None:
        assert isinstance(ex, SharedMemoryExchange)
        if ex.rank == 2:
            row = array("q", [5, 0])  # as `all_gather([5])` would send, with the doorbell's value
            ex._out[0].start(Head(kind=1, rows=1, row_bytes=16), row.buffer_info()[0])
            ex._out[0].push()
            return None
        for done in range(3):
            try:
                ex.all_gather([5])
            except PeerLost as lost:
                return [done, lost.rank, "no sign of life for 0.5 s" in lost.reason]
        return None

    assert run_threads(3, 64, work, timeout_s=0.5) == [[1, 2, True], [0, 2, True], None]


def test_who_waits_moves() -> None:
    """Rank 2 comes to each call only once the others have been seen to look around in it; between calls nobody does."""
    waiting = threading.Semaphore(0)

    def see(ex: Exchange) -> None:
        seen, end_s = {ex.alive_s}, time.monotonic() + 20.0
        while len(seen) < 6 and time.monotonic() < end_s:
            seen.add(ex.alive_s)
            time.sleep(0.001)
        if len(seen) == 6:
            waiting.release()

    def work(ex: Exchange) -> int:
        x, splits = torch.ones(ex.size, 4), [1] * ex.size
        calls: list[Callable[[], object]] = [
            lambda: ex.all_gather([1]),
            lambda: ex.dispatch(x, splits),
            lambda: ex.combine(x, splits, splits),
        ]
        assert ex.alive_s == inf
        ex.all_gather([0])
        for call in [*calls, *calls]:
            observer = threading.Thread(target=see, args=(ex,))
            if ex.rank == 2:
                assert all(waiting.acquire(timeout=20.0) for _ in range(2))
            else:
                observer.start()
            began_s = time.monotonic()
            call()
            alive_s = ex.alive_s
            time.sleep(0.002)
            assert began_s <= alive_s == ex.alive_s < time.monotonic()
            if ex.rank != 2:
                observer.join()
        return len(calls)

    assert run_threads(3, 64, work, timeout_s=30.0) == [3, 3, 3]


def test_who_sleeps_says_until_when() -> None:
    ex = SoloExchange()
    ex.all_gather([0])
    seen, alive_s = ex.doorbell(), ex.alive_s

    said: list[bool] = []

    def ring_once_it_sleeps() -> None:
        end_s = time.monotonic() + 10.0
        while ex.alive_s < alive_s + 20.0 and time.monotonic() < end_s:
            time.sleep(0.001)
        said.append(ex.alive_s >= alive_s + 20.0)
        ex.ring()

    observer = threading.Thread(target=ring_once_it_sleeps)
    observer.start()
    ex.wait(seen, 20.0)
    observer.join()
    assert said == [True]
    assert alive_s < ex.alive_s <= time.monotonic()


def test_leaving_member_is_named_by_who_waits_for_it() -> None:
    def work(ex: Exchange) -> int | None:
        if ex.rank == 1:
            ex.close()
            return None
        with pytest.raises(PeerLost, match="rank 1 was lost: it left") as e:
            ex.all_gather([1])
        return e.value.rank

    assert run_threads(3, 64, work) == [1, None, 1]


def test_closed_exchange_refuses_calls() -> None:
    region = Region(1, 64)
    member = region.member(0)
    member.close()
    member.close()
    member.ring()  # from whoever has not heard of it
    with pytest.raises(InternalError, match="closed"):
        member.all_gather([1])
    region.close()
