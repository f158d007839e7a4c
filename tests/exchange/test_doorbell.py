"""The doorbell: no ring is lost (X4), and who waits for it uses no CPU (X5)."""

from __future__ import annotations

import threading
import time

import pytest
from concertina.workers.exchange.base import Exchange
from concertina.workers.exchange.solo import SoloExchange

from . import scenarios
from .crew import Crew, run_threads


def test_solo_stress() -> None:
    assert scenarios.doorbell_stress(SoloExchange(), seed=1, items=300) == 300


@pytest.mark.parametrize("size", [2, 4])
def test_shared_stress_between_threads(size: int) -> None:
    results = run_threads(size, 64, lambda ex: scenarios.doorbell_stress(ex, seed=1, items=150))
    assert results == [150] * size


@pytest.mark.ray
@pytest.mark.parametrize(("kind", "size", "items"), [("shared", 2, 1500), ("shared", 4, 800), ("gloo", 3, 150)])
def test_stress_between_processes(crew: Crew, kind: str, size: int, items: int) -> None:
    crew.join(kind, size, timeout_s=60.0)
    assert crew.run("doorbell_stress", seed=7, items=items) == [items] * size
    crew.leave()


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["shared", "gloo"])
def test_idle_uses_no_cpu(crew: Crew, kind: str) -> None:
    crew.join(kind, 3)
    used = crew.run("idle_cpu", idle_s=2.0)
    assert max(used) < 0.2, used
    crew.leave()


def test_all_sleep_on_the_least_value_seen() -> None:
    """One member reads the bell after a ring, the other before it: neither may sleep through it."""
    first_has_read, rung = threading.Event(), threading.Event()

    def work(ex: Exchange) -> float:
        if ex.rank == 1:
            first_has_read.wait(10)
            ex.ring()
            rung.set()
        seen = ex.doorbell()
        if ex.rank == 0:
            first_has_read.set()
            rung.wait(10)
        ex.all_gather([0])
        began = time.monotonic()
        ex.wait(seen, 10.0)
        return time.monotonic() - began

    assert max(run_threads(2, 64, work)) < 10.0


def test_wait_ends_with_its_time_out_and_on_close() -> None:
    ex = SoloExchange()
    ex.wait(ex.doorbell(), 0.01)
    threading.Timer(0.05, ex.close).start()
    ex.wait(ex.doorbell(), 60.0)  # the test's own time-out would tell


def test_ring_before_wait_is_not_lost() -> None:
    def work(ex: Exchange) -> bool:
        seen = ex.doorbell()
        ex.all_gather([1])
        ex.ring()
        ex.wait(seen, 1e6)
        return True

    assert run_threads(3, 64, work) == [True] * 3
