"""Layers of few units (eq. 19): the bound holds by brute force (P-2), and is reached on equal devices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from concertina.planners.bounds import count_bound
from concertina.planners.components import best_division, divide, fleet_of
from concertina.planners.layer_search import LayerSearch
from concertina.planners.layout import device_time_D
from concertina.planners.params import Params
from concertina.planners.problem import Objective
from concertina.planners.units import layer_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from .instances import problem
from .test_search import sound
from .test_value_bound import optimum


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.0, 100.0).map(lambda t: round(t, 3)), min_size=1, max_size=4),
    st.sampled_from([[1.0, 1.0, 1.0], [1.0, 1.0, 0.5], [1.0, 0.3], [2.0, 2.0]]),
    st.integers(1, 3),
    st.floats(0.0, 40.0),
)
def test_no_placement_beats_the_bound(tokens: list[float], speeds: list[float], slots: int, size: float) -> None:
    """P-2: whatever is known, the bound stays below the optimum and the layout above."""
    if len(tokens) > slots * len(speeds):
        return
    p = problem(np.array([tokens]), speeds, slots, expert_bytes=size + 0.01)
    layer = layer_problem(p, 0)
    fleet, best_s = fleet_of(layer), optimum(p)
    assert fleet is not None
    for cost_s in (best_s, 1.3 * best_s, np.inf):
        bound_s, layout = best_division(layer, fleet, 0.0, cost_s)
        assert bound_s <= best_s * (1 + 1e-9)
        if layout is not None:
            sound(layer, layout)
            assert device_time_D(layer, layout).max() >= best_s * (1 - 1e-6)


@pytest.mark.parametrize("size", [1.0, 60.0])
def test_equal_devices_are_solved(size: float) -> None:
    """Eight units on eight devices: far from counting, and proved."""
    for seed in range(3):
        tokens = np.random.default_rng(seed).lognormal(0.0, 0.8, (1, 8)) * 64
        layer = layer_problem(problem(tokens, [1.0] * 8, 5, expert_bytes=size), 0)
        search = LayerSearch(layer, Objective(), Params(), None)
        for _ in range(3):
            search.advance(0.0)
        assert count_bound(layer, layer.tokens_U, layer.base_D) <= search.bound_s * (1 + 1e-9)
        assert search.bound_s <= search.cost_s <= search.bound_s * (1 + 1e-5)


def test_the_division_is_the_best_of_all() -> None:
    """Against all partitions of three units and all deals of devices of two kinds."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        least = rng.random((8, 3, 2))
        least[0], least[:, 0, 0] = np.inf, np.inf
        value, groups = divide(least)
        best = np.inf
        partitions = [[7], [1, 6], [2, 5], [4, 3], [1, 2, 4]]
        for parts in partitions:
            for deal in itertools.product(itertools.product(range(3), range(2)), repeat=len(parts)):
                if sum(a for a, _ in deal) <= 2 and sum(b for _, b in deal) <= 1:
                    best = min(best, max(float(least[s, a, b]) for s, (a, b) in zip(parts, deal, strict=True)))
        assert value == best
        if np.isfinite(best):
            assert max(float(least[group]) for group in groups) == best
            assert sum(units for units, _, _ in groups) == 7


def test_large_layers_and_many_kinds_are_left_to_the_search() -> None:
    assert fleet_of(layer_problem(problem(np.ones((1, 9)), [1.0] * 4, 4), 0)) is None
    assert fleet_of(layer_problem(problem(np.ones((1, 4)), [1.0, 0.5, 0.25], 4), 0)) is None
    assert fleet_of(layer_problem(problem(np.ones((1, 4)), [1.0] * 17, 4), 0)) is None
