"""Affinity in plans made layer by layer: contents are exchanged between alike devices only, and only to gain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from concertina.planners import scalable
from concertina.planners.align import aligned
from concertina.planners.assemble import layout_of, placement_of
from concertina.planners.check import check, check_placement
from concertina.planners.cost import evaluate
from concertina.planners.problem import PlacementProblem, Prices
from concertina.planners.solution import Solution, StoppingRule
from concertina.planners.solve import solve
from concertina.planners.units import layer_problems

from .instances import problem, single

STOP = StoppingRule(gap=1e-4, iterations=6)


def random_problem(seed: int, speeds: list[float], experts: int = 24, layers: int = 4) -> PlacementProblem:
    rng = np.random.default_rng(seed)
    tokens = rng.lognormal(0, 0.5, (layers, experts)) * 10
    pairs = rng.gamma(0.1, 1.0, (layers - 1, experts, experts))
    return problem(tokens, speeds, 6, expert_bytes=0.1, nodes=2, pairs=pairs, hidden_bytes=1.0)


def solved(p: PlacementProblem) -> Solution:
    answer = solve(p, "scalable", stop=STOP)
    assert isinstance(answer, Solution)
    assert check(p, answer) == []
    return answer


def unaligned(p: PlacementProblem, monkeypatch: pytest.MonkeyPatch) -> Solution:
    with monkeypatch.context() as patch:
        patch.setattr(scalable, "aligned", lambda problem, layers, layouts, in_time: layouts)
        return solved(p)


def test_a_chain_of_experts_stays_on_its_device() -> None:
    """One expert per device, each handing all its tokens to one of the next layer: nothing need travel."""
    pairs = np.stack([np.roll(np.eye(6), shift, axis=1) for shift in (1, 4)])
    p = problem(np.full((3, 6), 10.0), [1.0] * 6, 1, nodes=3, pairs=pairs, hidden_bytes=5.0)
    cost = solved(p).cost
    assert cost.node_L[1:].sum() + cost.cluster_L[1:].sum() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("speeds", [[1.0] * 6, [1.0, 1.0, 0.5, 1.0, 0.5, 0.5]], ids=["equal", "mixed"])
def test_links_carry_less_and_steps_take_as_long(speeds: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        p = random_problem(seed, speeds)
        ours, blind = solved(p).cost, unaligned(p, monkeypatch).cost
        np.testing.assert_allclose(ours.step_L, blind.step_L, rtol=1e-9)
        links = ours.node_L.sum() + ours.cluster_L.sum()
        assert links < (blind.node_L.sum() + blind.cluster_L.sum()) * 0.999


def test_moves_cost_more_than_links_save() -> None:
    """Eq. 9: contents stay where they are if moving them costs more than it saves; without a price they go."""
    pairs = np.roll(np.eye(4), 1, axis=1)[None]
    owners = [[0, 1, 2, 3], [0, 1, 2, 3]]
    now = single(tuple(f"d{i}" for i in range(4)), owners)
    p = problem(np.full((2, 4), 10.0), [1.0] * 4, 1, pairs=pairs, hidden_bytes=1.0, current=now)
    for price, same in ((0.0, False), (1e6, True)):
        q = replace(p, prices=Prices(price))
        layers = layer_problems(q)
        layouts = [layout_of(q, layer, now) for layer in layers]
        after = placement_of(q, layers, aligned(q, layers, [lay for lay in layouts if lay is not None], lambda: True))
        assert check_placement(q, after) == []
        assert (after == now) is same
        assert evaluate(q, after).total <= evaluate(q, now).total


def test_no_time_no_exchange() -> None:
    p = random_problem(0, [1.0] * 6)
    layers = layer_problems(p)
    layouts = [layout_of(p, layer, solved(p).placement) for layer in layers]
    known = [lay for lay in layouts if lay is not None]
    assert aligned(p, layers, known, lambda: False) == known
