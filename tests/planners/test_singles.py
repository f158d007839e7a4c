"""One slot per device (eq. 18): equal to brute force, and the search uses it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from concertina.planners.bounds import count_bound
from concertina.planners.layer_search import LayerSearch
from concertina.planners.layout import device_time_D
from concertina.planners.params import Params
from concertina.planners.problem import Objective
from concertina.planners.singles import PRECISION, applies, best_singles
from concertina.planners.units import LayerProblem, layer_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from .instances import problem
from .test_search import sound


def layer_of(tokens: list[float], fast: int, slow: int, speed: float, size: float) -> LayerProblem:
    speeds = [1.0, speed] * min(fast, slow) + [1.0] * (fast - slow) + [speed] * (slow - fast)
    return layer_problem(problem(np.array([tokens]), speeds, 1, expert_bytes=size), 0)


def least_time(layer: LayerProblem) -> float:
    """Over all numbers of devices of both kinds for every unit: each unit's devices share its tokens evenly in time."""
    kinds = sorted(set(zip(layer.token_s_D.tolist(), layer.read_UD[0].tolist(), strict=True)))
    count = [sum(layer.token_s_D[d] == rate for d in range(layer.devices)) for rate, _ in kinds]
    every = [list(itertools.product(*(range(c + 1) for c in count)))[1:]] * layer.units
    best = np.inf
    for choice in itertools.product(*every):
        if all(sum(each[k] for each in choice) <= count[k] for k in range(len(kinds))):
            times = []
            for tokens, each in zip(layer.tokens_U.tolist(), choice, strict=True):
                used = [(rate, read) for (rate, read), n in zip(kinds, each, strict=True) for _ in range(n)]
                level = (tokens + sum(read / rate for rate, read in used)) / sum(1 / rate for rate, _ in used)
                times.append(max(level, max(read for _, read in used)))
            best = min(best, max(times))
    return best


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.0, 100.0).map(lambda t: round(t, 3)), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([0.3, 0.5, 1.0]),
    st.floats(0.1, 30.0),
)
def test_equal_to_brute_force(tokens: list[float], fast: int, slow: int, speed: float, size: float) -> None:
    if len(tokens) > fast + slow:
        return
    layer = layer_of(tokens, fast, slow, speed, size)
    assert applies(layer)
    optimum = least_time(layer)
    low_s, layout = best_singles(layer, 0.1 * optimum, 3.0 * optimum)
    assert low_s <= optimum * (1 + 1e-9)
    assert layout is not None
    sound(layer, layout)
    assert optimum * (1 - 1e-9) <= device_time_D(layer, layout).max() <= optimum * (1 + 2 * PRECISION)


def test_the_search_ends_at_the_optimum() -> None:
    """Two kinds, reading heavy: count and prices leave a gap of per cents; the answer is exact."""
    tokens = np.random.default_rng(1).lognormal(0.0, 0.8, 48) * 64
    layer = layer_of(tokens.tolist(), 40, 24, 0.5, 60.0)
    counted = count_bound(layer, layer.tokens_U, layer.base_D)
    search = LayerSearch(layer, Objective(), Params(), None)
    for _ in range(3):
        search.advance(0.0)
    assert counted * 1.01 < search.bound_s <= search.cost_s <= search.bound_s * (1 + 2 * PRECISION)


@pytest.mark.parametrize("change", ["slots", "kinds", "bytes"])
def test_other_layers_are_left_to_the_search(change: str) -> None:
    tokens = np.array([[5.0, 3.0, 2.0]])
    slots = 2 if change == "slots" else 1
    speeds = [1.0, 0.5, 0.25, 0.25] if change == "kinds" else [1.0, 0.5, 0.5, 0.5]
    size = np.array([[1.0, 2.0, 3.0]]) if change == "bytes" else 1.0
    assert not applies(layer_problem(problem(tokens, speeds, slots, expert_bytes=size), 0))
