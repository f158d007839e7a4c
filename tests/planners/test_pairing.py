"""Search over cuts on alike devices (eq. 24): pairs against brute force, triples, and layouts that are sound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from concertina.planners.layer_search import LayerSearch
from concertina.planners.layout import Layout, device_time_D
from concertina.planners.pairing import Pairing, Shape, evened, pairable
from concertina.planners.params import Params
from concertina.planners.problem import Objective
from concertina.planners.units import LayerProblem, layer_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from .instances import problem
from .test_search import sound


def alike_layer(seed: int, experts: int, devices: int, size: float, speeds: list[float] | None = None) -> LayerProblem:
    loads_LE = np.random.default_rng(seed).lognormal(0, 0.8, (1, experts)) * 10
    slots = np.full(devices, 3)
    return layer_problem(problem(loads_LE, speeds or [1.0] * devices, slots, expert_bytes=size), 0)


def whole(layer: LayerProblem) -> Layout:
    """Every unit on one device, in turn."""
    units = np.arange(layer.units)
    return Layout(units, units % layer.devices, layer.tokens_U)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 3), st.integers(0, 1), st.floats(0.0, 0.5))
def test_no_pairing_leaves_less(seed: int, pairs: int, triples: int, above: float) -> None:
    """The largest head with the largest companion that fits: no other choice of companions holds more."""
    layer = alike_layer(seed, 2 * pairs + 3 * triples, pairs + triples, 5.0)
    layout = whole(layer)
    pairing = Pairing(layer, layout, float(device_time_D(layer, layout).max()), 0)
    size = sorted(layer.tokens_U.tolist(), reverse=True)
    most = size[0] + size[pairs] * (1.0 + above)
    pairing.room = most + 2.0 * pairing.read
    rest = pairing._left(Shape({}, size[::-1], triples), [])
    heads, others = size[:pairs], size[pairs:]
    held = [
        sum(chosen)
        for chosen in itertools.permutations(others, pairs)
        if all(h + c <= most for h, c in zip(heads, chosen, strict=True))
    ]
    assert (rest is None) == (not held)
    if rest is not None:
        assert sum(rest) == pytest.approx(sum(others) - max(held))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12))
def test_triples_keep_their_pieces_and_never_get_less_even(seed: int, triples: int) -> None:
    size_P = np.random.default_rng(seed).lognormal(0, 0.8, 3 * triples)
    even_TK = evened(size_P, triples, float(size_P.sum()) / max(1, triples), seed)
    np.testing.assert_array_equal(np.sort(even_TK, axis=None), np.sort(size_P))
    in_turn = np.sort(size_P)[::-1].reshape(3, triples).sum(axis=0)
    assert even_TK.sum(axis=1).max(initial=0.0) <= in_turn.max(initial=0.0) * (1.0 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 12), st.integers(0, 12), st.floats(1.0, 60.0))
def test_layouts_are_sound_and_runs_repeat(seed: int, devices: int, more: int, size: float) -> None:
    layer = alike_layer(seed, devices + min(more, 2 * devices), devices, size)
    layout = whole(layer)
    assert pairable(layer, layout)
    time_s = float(device_time_D(layer, layout).max())
    first, second = (Pairing(layer, layout, time_s, seed).run(0.0, 200) for _ in range(2))
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        sound(layer, first)
        np.testing.assert_array_equal(first.device_R, second.device_R)
        np.testing.assert_array_equal(first.tokens_R, second.tokens_R)


def test_only_alike_devices_with_one_to_three_replicas() -> None:
    layer = alike_layer(0, 8, 4, 5.0)
    assert pairable(layer, whole(layer))
    everywhere = Layout(np.arange(8), np.zeros(8, dtype=np.int64), layer.tokens_U)
    assert not pairable(layer, everywhere)
    mixed = alike_layer(0, 8, 4, 5.0, [1.0, 1.0, 1.0, 0.5])
    assert not pairable(mixed, whole(mixed))


def test_pairing_improves_what_other_search_ends_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer like those of the benchmark's decode cases; both searches do 30 pieces of work."""
    layer, cost = alike_layer(3, 128, 64, 6.0), {}
    for pairs in (False, True):
        monkeypatch.setattr("concertina.planners.layer_search.alike", lambda _, pairs=pairs: pairs)
        search = LayerSearch(layer, Objective(), Params(), None)
        for _ in range(30):
            search.advance(0.0)
        assert search.best is not None
        assert pairable(layer, search.best)
        sound(layer, search.best)
        assert search.bound_s <= search.cost_s * (1.0 + 1e-9)
        cost[pairs] = search.cost_s / search.bound_s - 1.0
    assert cost[True] < 0.95 * cost[False], cost
