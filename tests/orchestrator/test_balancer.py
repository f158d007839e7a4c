"""Measured loads, and the decision to move experts (invariant C5: a move pays within its horizon, or is not made)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from concertina.errors import OperatorError
from concertina.orchestrator.balancer import Balancer
from concertina.orchestrator.core.layout import Seat
from concertina.orchestrator.loads import LoadWindow, write_loads
from concertina.orchestrator.placing import Site, better_placement, even_loads, first_placement
from concertina.orchestrator.planfiles import read_loads
from concertina.planners.model import Loads, ModelSpec
from concertina.workers.engine.stats import EngineStats
from concertina.workers.roles import WorkerReport
from hypothesis import given, settings
from hypothesis import strategies as st

SEATS = (Seat("cpu-0", "a"), Seat("cpu-1", "a"))
MODEL = ModelSpec(layers=2, experts=8, expert_bytes=1e5, flops_per_token=3e6, hidden_bytes=256, top_k=2)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def report(name: str, counts: np.ndarray, steps: int, serving: int = 1) -> WorkerReport:
    pairs = tuple(tuple(int(n) for n in row) for row in counts)
    stats = EngineStats(steps=steps)
    return WorkerReport(name, 1, frozenset(), serving, "", stats=stats, counts_LE=pairs, counted=serving)


@given(st.lists(st.tuples(st.floats(0, 1000), st.integers(0, 500)), max_size=20))
def test_the_window_halves_per_half_life_and_adds_what_is_new(updates):
    window = LoadWindow.empty(1, 2, 0.0, half_life_s=10.0)
    expected, at = 0.0, 0.0
    for wait_s, pairs in updates:
        at += wait_s
        expected = expected * 0.5 ** (wait_s / 10.0) + pairs
        window = window.updated(np.array([[pairs, 0.0]]), 1, at)
    assert window.pairs_LE[0, 0] == pytest.approx(expected, abs=1e-6)
    assert window.pairs_LE[0, 1] == 0


def test_loads_are_read_back_as_they_were_measured(tmp_path):
    counts = np.arange(16, dtype=float).reshape(2, 8)
    path = str(tmp_path / "loads.json")
    write_loads(path, LoadWindow(counts * 4, 4.0, 0.0))
    assert np.allclose(read_loads(path, MODEL).mean_LE, counts)
    assert json.loads((tmp_path / "loads.json").read_text())["scenarios"][0]["name"] == "measured"
    assert [p.name for p in tmp_path.iterdir()] == ["loads.json"]
    with pytest.raises(OperatorError, match="cannot be written"):
        write_loads(str(tmp_path / "no" / "loads.json"), LoadWindow.empty(2, 8, 0.0))


def test_differences_are_counted_once_and_a_new_generation_from_zero():
    clock = Clock()
    balancer = Balancer(MODEL, 60.0, None, clock)
    ones = np.ones((2, 8))
    balancer.observe({})
    balancer.observe({"w0": report("w0", ones * 10, 100), "w1": report("w1", ones * 20, 100)})
    balancer.observe({"w0": report("w0", ones * 10, 100), "w1": report("w1", ones * 25, 110)})
    assert balancer.window.pairs_LE.sum() == 16 * 35
    assert balancer.window.steps == 10
    balancer.observe({"w0": report("w0", ones * 3, 120, serving=2), "w1": report("w1", ones * 5, 120, serving=2)})
    assert balancer.window.pairs_LE.sum() == 16 * 43
    left = replace(report("w1", ones * 6, 121, serving=2), serving=0, retired=3)
    balancer.observe({"w0": report("w0", ones * 4, 121, serving=2), "w1": left})
    assert balancer.window.pairs_LE.sum() == 16 * 45, "one that has left still tells what it had counted"


def test_what_was_counted_before_a_restart_of_the_controller_is_left_out():
    balancer = Balancer(MODEL, 60.0, None, Clock())
    ones = np.ones((2, 8))
    balancer.observe({"w0": report("w0", ones * 1e12, 10**9)})
    assert balancer.window.pairs_LE.sum() == balancer.window.steps == 0
    balancer.observe({"w0": report("w0", ones * (1e12 + 4), 10**9 + 2)})
    assert (balancer.window.pairs_LE.sum(), balancer.window.steps) == (16 * 4, 2)


def test_it_plans_only_when_it_is_time_and_enough_was_seen():
    clock = Clock()
    balancer = Balancer(MODEL, 60.0, None, clock)
    balancer.observe({"w0": report("w0", np.ones((2, 8)), 1)})
    clock.now_s = 61.0
    assert not balancer.due, "a handful of tokens says nothing"
    balancer.observe({"w0": report("w0", np.ones((2, 8)) * 1000, 10)})
    assert balancer.due
    never = Balancer(MODEL, 0.0, None, clock)
    never.observe({})
    never.observe({"w0": report("w0", np.ones((2, 8)) * 1000, 10)})
    clock.now_s = 1e6
    assert not never.due


@pytest.mark.parametrize("spare_slots", [0, 4])
def test_skewed_loads_move_experts_and_even_ones_do_not(tmp_path, spare_slots):
    """C5, and the plan is kept in the file. Without spare slots experts change places."""
    clock, site = Clock(), Site(SEATS, MODEL, spare_slots=spare_slots)
    here = first_placement(site, even_loads(MODEL), Clock())
    on_first = [e for e in range(8) if here.replicas_LE[0][e][0].device == 0]
    skewed = np.ones((2, 8))
    skewed[:, on_first] = 400
    loads_file = str(tmp_path / "loads.json")
    balancer = Balancer(MODEL, 60.0, loads_file, clock)
    balancer.observe({"w0": report("w0", np.zeros((2, 8)), 0)})
    balancer.observe({"w0": report("w0", skewed * 100, 100)})
    moved = balancer.plan(site, here)
    assert moved is not None
    assert moved.devices == here.devices
    assert "migrate" in balancer.reason
    assert (tmp_path / "loads.json").exists()
    assert balancer.plan(site, moved) is None, "a second plan for the same loads must stay"
    assert balancer.reason.startswith("stay")


@pytest.mark.parametrize(("horizon_s", "moves"), [(60.0, True), (0.2, False)])
def test_a_gain_that_does_not_pay_within_the_horizon_is_left(horizon_s, moves):
    """C5: the same plan, for the same loads; what it costs is a pause of 50 ms."""
    site = Site(SEATS, MODEL)
    current = first_placement(site, even_loads(MODEL), Clock())
    skewed = np.ones((2, 8))
    skewed[:, [e for e in range(8) if current.replicas_LE[0][e][0].device == 0]] = 1.5
    verdict = better_placement(site, Loads(skewed), current, horizon_s, Clock())
    assert (verdict.placement is not None) == moves, verdict.reason


def test_staying_is_explained():
    site = Site(SEATS, MODEL)
    current = first_placement(site, even_loads(MODEL), Clock())
    verdict = better_placement(site, Loads(np.ones((2, 8))), current, 60.0, Clock())
    assert verdict.placement is None
    assert verdict.reason.startswith("stay")


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 6))
@settings(max_examples=25)
def test_first_placements_fill_slots_evenly(devices, experts, spare):
    model = ModelSpec(layers=2, experts=experts, expert_bytes=1e5, flops_per_token=3e6)
    site = Site(tuple(Seat(f"cpu-{i}", "a") for i in range(devices)), model, spare)
    placement = first_placement(site, even_loads(model), Clock())
    for layer in placement.experts_LD:
        assert max(map(len, layer)) <= max(site.slots_D)
        assert {e for on in layer for e in on} == set(range(experts))
