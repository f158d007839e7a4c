"""What holds for every exchange: rows arrive where and as they were sent (X1), whatever their number and type."""

from __future__ import annotations

import pytest
from concertina.workers.exchange.base import Exchange
from concertina.workers.exchange.solo import SoloExchange
from hypothesis import given, settings
from hypothesis import strategies as st

from . import scenarios
from .crew import Crew, run_threads

CAPACITIES = (1, 200, 1 << 16)


def _all(ex: Exchange, rounds: int, nbytes: int) -> None:
    scenarios.random_rounds(ex, seed=1, rounds=rounds)
    scenarios.every_dtype(ex)
    scenarios.large(ex, nbytes)
    scenarios.overlapped(ex)


def test_solo() -> None:
    _all(SoloExchange(), 100, 10_000)


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shared_between_threads(size: int, capacity: int) -> None:
    run_threads(size, capacity, lambda ex: _all(ex, 60, 20 * capacity))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 4), capacity=st.integers(1, 300), seed=st.integers(0, 2**32), rows=st.integers(0, 20))
def test_any_sizes_arrive(size: int, capacity: int, seed: int, rows: int) -> None:
    run_threads(size, capacity, lambda ex: scenarios.random_rounds(ex, seed, 5, rows))


@pytest.mark.ray
@pytest.mark.parametrize(("kind", "rounds"), [("shared", 1000), ("gloo", 150)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_between_processes(crew: Crew, kind: str, rounds: int, size: int) -> None:
    crew.join(kind, size, capacity=2000)
    assert crew.run("random_rounds", seed=size, rounds=rounds) == [rounds] * size
    crew.run("every_dtype")
    crew.run("large", nbytes=400_000)
    crew.run("overlapped")
    crew.leave()
