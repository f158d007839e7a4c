"""The bound by prices of pieces (eq. 17): its two exact parts against brute force, and no placement beats it (P-2)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from concertina.planners.bounds import count_bound
from concertina.planners.improve import Search
from concertina.planners.layer_search import LayerSearch
from concertina.planners.params import Params
from concertina.planners.piece_cuts import Cuts
from concertina.planners.piece_prices import LATTICE, Kind, Prices
from concertina.planners.price_bound import Pricing, trial_at
from concertina.planners.price_program import best_prices
from concertina.planners.problem import Objective
from concertina.planners.recipe import TRIES, followed, rounded
from concertina.planners.units import layer_problem
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .instances import problem
from .test_search import sound
from .test_value_bound import optimum


def some_prices(seed: int, corners: int) -> Prices:
    """Nondecreasing, with flat parts, steep parts and sometimes nothing for the smallest pieces."""
    rng = np.random.default_rng(seed)
    inner = rng.choice(np.arange(1, LATTICE), corners - 2, replace=False)
    rise_K = rng.exponential(1.0, corners) * (rng.random(corners) < 0.6)
    return Prices(np.sort(np.append(inner, [0, LATTICE])), np.cumsum(rise_K) / corners)


prices = st.builds(some_prices, st.integers(0, 10**6), st.integers(2, 7))


@settings(max_examples=60, deadline=None)
@given(prices, st.floats(0.1, 1.0), st.floats(0.0, 0.9), st.integers(1, 4), st.integers(0, 10**6))
def test_no_device_holds_more_than_said(p: Prices, single: float, read: float, slots: int, seed: int) -> None:
    """Against all choices of corners with one piece of the rest, and pieces at random."""
    kind = Kind((single + read) * LATTICE, read * LATTICE, slots, (0,))
    worth_B, weight_BK = p.most_held(kind, 1.0)
    np.testing.assert_allclose(weight_BK @ p.price_K, worth_B, atol=1e-9)
    best = 0.0
    for count in range(1, kind.held + 1):
        full = kind.room - count * kind.read
        for corners in itertools.combinations_with_replacement(range(len(p.at_K)), count - 1):
            rest = full - float(p.at_K[list(corners)].sum())
            if rest >= 0.0:
                last = float(p.at(np.array(min(rest, LATTICE))))
                best = max(best, float(p.price_K[list(corners)].sum()) + last)
    assert worth_B.max() == pytest.approx(best, abs=1e-9)
    rng = np.random.default_rng(seed)
    for count in range(1, kind.held + 1):
        part_NP = rng.dirichlet(np.full(count, 0.5), 50) * (kind.room - count * kind.read)
        part_NP = part_NP[(part_NP <= LATTICE).all(axis=1)]
        assert (p.at(part_NP).sum(axis=1) <= worth_B.max() + 1e-9).all()


@settings(max_examples=60, deadline=None)
@given(prices, st.lists(st.floats(0.0, 4.0 * LATTICE), min_size=1, max_size=5), st.integers(0, 10**6))
@example(some_prices(77688, 3), [497.0], 0)  # hundreds of pieces are cheapest
def test_no_cut_is_cheaper_than_said(p: Prices, sizes: list[float], seed: int) -> None:
    """Against two pieces on any corner, and pieces at random; the weights are those of a cut."""
    size_U = np.array(sizes)
    cuts = Cuts(p, size_U)
    assert (cuts.least_U <= cuts.worth_U + 1e-12).all()
    cut_worth_U = cuts.weights() @ p.price_K  # of more than `MOST_PIECES` pieces where that is cheaper still
    assert (cut_worth_U <= cuts.worth_U + 1e-9).all()
    assert (cut_worth_U >= cuts.least_U - 1e-9).all()
    np.testing.assert_allclose(cuts.weights() @ p.at_K, size_U, rtol=1e-9, atol=1e-6)
    rng = np.random.default_rng(seed)
    for u, size in enumerate(sizes):
        for corner in p.at_K.tolist():
            if 0.0 <= size - corner <= LATTICE:
                two = float(p.at(np.array([corner, size - corner], dtype=np.float64)).sum())
                assert cuts.least_U[u] <= two + 1e-9
        for count in range(1, 7):
            part_NP = rng.dirichlet(np.full(count, 0.5), 50) * size
            part_NP = part_NP[(part_NP <= LATTICE).all(axis=1)]
            assert (p.at(part_NP).sum(axis=1) >= cuts.least_U[u] - 1e-9).all()


@pytest.mark.parametrize("speeds", [[1.0, 1.0, 1.0], [2.0, 2.0, 1.0], [1.5, 1.0, 1.0]], ids=str)
def test_no_placement_beats_the_bound(speeds: list[float]) -> None:
    """P-2 by brute force, with what was learned on one layer carried to the next."""
    raised, pricing = 0, Pricing()
    for seed in range(6):
        tokens = np.random.default_rng(seed).lognormal(0.0, 0.6, (1, 5)).round(2) * 10.0
        p = problem(tokens, speeds, 2, expert_bytes=12.0)
        layer = layer_problem(p, 0)
        known_s, best_s = count_bound(layer, layer.tokens_U, layer.base_D), optimum(p)
        bound_s, _ = pricing.bound(layer, known_s, best_s * 1.1)
        assert known_s <= bound_s <= best_s * (1 + 1e-9)
        raised += bound_s > known_s * 1.001
    assert raised > 0


def layer_of(seed: int, mixed: bool) -> LayerSearch:
    speeds = [1.0, 1.0, 1.0, 0.5] * 6 if mixed else [1.0] * 24
    tokens = np.random.default_rng(seed).lognormal(0.0, 0.8, (1, 48)) * 64
    p = problem(tokens, speeds, np.full(24, 3), expert_bytes=60.0)
    return LayerSearch(layer_problem(p, 0), Objective(), Params(), None)


@pytest.mark.parametrize("mixed", [False, True])
def test_prices_raise_the_bound_where_devices_hold_two_or_three(mixed: bool) -> None:
    """Heavy reading: the search seeks prices by itself, finds more than counting, and never more than it costs."""
    for seed in range(3):
        search = layer_of(seed, mixed)
        counted_s = search.bound_s
        for _ in range(6):
            search.advance(0.0)
        assert counted_s * 1.001 < search.bound_s <= search.cost_s


@pytest.mark.parametrize("mixed", [False, True])
def test_layouts_after_the_relaxation_are_sound_and_good(mixed: bool) -> None:
    """Every offset of rounding keeps slots and tokens; searched, the best is within 2 % of the bound."""
    search = layer_of(1, mixed)
    layer = search.layer
    search.advance(0.0)
    bound_s, found = Pricing().bound(layer, search.bound_s, search.cost_s)
    times = []
    for priced in found:
        for offset, above in TRIES:
            layout = followed(layer, priced, offset, above)
            if layout is not None:
                sound(layer, layout)
                local = Search(layer, layout)
                local.run(bound_s, 0.0, 200)
                times.append(local.time_s)
    assert bound_s <= min(times) <= bound_s * 1.02


def test_the_program_ends_near_its_value() -> None:
    """Better prices than in proportion to tokens and reading, the same every time."""
    layer = layer_of(0, True).layer
    trial = trial_at(layer, layer.tokens_U, layer.base_D, 1.1 * count_bound(layer, layer.tokens_U, layer.base_D))
    assert trial is not None
    at_K = np.unique(np.append(np.arange(0, LATTICE + 1, 6), trial.marks))
    first = Prices(at_K, at_K * trial.step + min(kind.read for kind in trial.kinds))
    found = best_prices(trial, first)
    assert found.ratio > trial.ratio(first)
    assert trial.ratio(found.prices) == pytest.approx(found.ratio, rel=1e-9)
    assert best_prices(trial, first).ratio == found.ratio
    for kind, bundles in zip(trial.kinds, found.bundles, strict=True):
        assert sum(times for _, times in bundles) == pytest.approx(kind.count * found.ratio, rel=2e-3)
        for pieces, _ in bundles:
            assert sum(pieces) * trial.step + len(pieces) * kind.read <= kind.room * (1 + 1e-9)
        for offset, _ in TRIES:
            assert len(rounded(bundles, kind.count, offset)) <= kind.count
    for unit, pieces in found.cuts.items():
        assert sum(pieces) == pytest.approx(trial.size_U[unit])
