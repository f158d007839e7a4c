"""The per-batch split; invariants P-7, P-8."""

from __future__ import annotations

import numpy as np
import pytest
from concertina.errors import OperatorError
from concertina.planners.placement import Replica
from concertina.planners.split import SplitTable, split
from concertina.planners.split_reference import best_split_lp
from hypothesis import given, settings
from hypothesis import strategies as st


def table(rng: np.random.Generator, experts: int, devices: int, mixed: bool) -> SplitTable:
    """Random replicas with random shares; slots do not matter here."""
    rows = []
    for _ in range(experts):
        on = rng.permutation(devices)[: rng.integers(1, min(devices, 4) + 1)]
        share = rng.dirichlet(np.ones(len(on)))
        rows.append([Replica(int(d), 0, float(max(s, 1e-6))) for d, s in zip(on, share, strict=True)])
    rate = rng.choice([0.5, 1.0, 3.0], devices) if mixed else np.ones(devices)
    return SplitTable(rows, rate, rng.random(devices) * 20 if mixed else None)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 24), st.integers(1, 9), st.booleans(), st.integers(0, 2000))
def test_split_adds_up_and_never_loses_to_fixed_shares(
    seed: int, experts: int, devices: int, mixed: bool, most: int
) -> None:
    """P-7: whole tokens that add up per expert, none negative, and never slower than the fixed shares."""
    rng = np.random.default_rng(seed)
    t = table(rng, experts, devices, mixed)
    tokens = rng.integers(0, most + 1, experts)
    tokens_R = split(t, tokens)
    assert (tokens_R >= 0).all()
    assert np.bincount(t.expert_R, weights=tokens_R, minlength=experts).tolist() == tokens.tolist()
    assert t.time_D(tokens_R).max() <= t.time_D(t.by_share(tokens)).max() + 1e-9


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 16), st.integers(2, 8), st.booleans())
def test_split_is_close_to_the_linear_program(seed: int, experts: int, devices: int, mixed: bool) -> None:
    """P-8: within the tolerance and the grain of whole tokens of the optimum, given sweeps enough."""
    rng = np.random.default_rng(seed)
    t = table(rng, experts, devices, mixed)
    tokens = rng.integers(0, 5000, experts)
    best, part_R = best_split_lp(t, tokens)
    assert t.time_D(part_R).max() == pytest.approx(best, rel=1e-6)
    got = t.time_D(split(t, tokens, tolerance=1e-3, rounds=300)).max()
    grain = 2 * devices * float(t.token_s_D.max())
    assert best * (1 - 1e-6) <= got <= best * 1.01 + grain


def test_a_chain_of_replicas_carries_tokens_across() -> None:
    """Load must flow from device 0 to 3 through experts that overlap pairwise; fixed shares leave 0 alone."""
    rows = [[Replica(d, 0, 0.5), Replica(d + 1, 0, 0.5)] for d in range(3)]
    t = SplitTable(rows, np.ones(4))
    tokens = np.array([3000, 1000, 0])
    got = split(t, tokens, tolerance=1e-4, rounds=100)
    assert t.time_D(got).max() == pytest.approx(best_split_lp(t, tokens)[0], rel=2e-3)


@pytest.mark.parametrize("mixed", [False, True])
def test_split_proves_its_tolerance_where_every_expert_is_shared(mixed: bool) -> None:
    """P-8 at the size of the step path: paths find what passes over pairs of replicas leave 1 to 3 % off."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        rounds = [rng.permutation(64).tolist() for _ in range(4)]
        pairs = [(a, b) for order in rounds for a, b in zip(order, order[1:] + order[:1], strict=True)]
        rows = [[Replica(a, 0, 0.5), Replica(b, 0, 0.5)] for a, b in pairs]
        t = SplitTable(rows, np.where(np.arange(64) % 3 == 2, 2.5, 1.0) if mixed else np.ones(64))
        tokens = rng.poisson(rng.lognormal(0.0, 1.0, 256) * 512)
        assert t.time_D(split(t, tokens, rounds=200)).max() <= best_split_lp(t, tokens)[0] * 1.0051


@pytest.mark.parametrize("copies", [2, 3, 6])
def test_split_proves_its_tolerance_with_more_replicas(copies: int) -> None:
    """P-8 on random devices of two speeds, with the default limits: what the step path meets at its worst."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rows = [[Replica(int(d), 0, 1 / copies) for d in rng.permutation(64)[:copies]] for _ in range(256)]
        t = SplitTable(rows, np.where(np.arange(64) % 3 == 2, 2.5, 1.0))
        tokens = rng.poisson(rng.lognormal(0.0, 1.0, 256) * 512)
        assert t.time_D(split(t, tokens)).max() <= best_split_lp(t, tokens)[0] * 1.0051


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 16), st.integers(1, 8), st.booleans())
def test_no_closed_set_lies_above_the_optimum(seed: int, experts: int, devices: int, mixed: bool) -> None:
    """Eq. 21 whatever the guess; with the optimum itself as the guess it is the optimum where no devices are tied."""
    rng = np.random.default_rng(seed)
    t = table(rng, experts, devices, mixed)
    tokens = rng.integers(0, 3000, experts)
    best, part_R = best_split_lp(t, tokens)
    for guess_D in (rng.random(devices), t.time_D(t.by_share(tokens)), t.time_D(part_R)):
        assert t._closed_sets.bound(tokens, guess_D) <= best * (1 + 1e-6) + 1e-9


def test_the_bound_is_the_optimum_once_the_slow_devices_are_the_right_ones() -> None:
    """Devices 0 and 1 share their experts with each other only: 3,000 tokens at speeds 1 and 2."""
    rows = [[Replica(0, 0, 0.5), Replica(1, 0, 0.5)], [Replica(1, 0)], [Replica(1, 0, 0.5), Replica(2, 0, 0.5)]]
    t = SplitTable(rows, np.array([1.0, 0.5, 1.0]), np.array([0.0, 60.0, 0.0]))
    tokens = np.array([2000, 1000, 600])
    expected = (2000 + 1000 + 60.0 / 0.5) / (1 + 2)
    assert t._closed_sets.bound(tokens, np.array([9.0, 8.0, 1.0])) == pytest.approx(expected)
    assert best_split_lp(t, tokens)[0] == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 24), st.integers(1, 9), st.booleans(), st.integers(0, 2000))
def test_a_linear_step_keeps_totals_and_leaves_no_replica_below_zero(
    seed: int, experts: int, devices: int, mixed: bool, most: int
) -> None:
    """P-7 for the step alone (eq. 22), from any split and any bound."""
    rng = np.random.default_rng(seed)
    t = table(rng, experts, devices, mixed)
    tokens = rng.integers(0, most + 1, experts)
    start_R = t.by_share(tokens)
    bound = float(t.time_D(start_R).max() * rng.random()) + 1e-3
    after_R = t._spread.after(start_R, tokens, t.time_D(start_R), bound)
    assert (after_R >= 0).all()
    assert np.bincount(t.expert_R, weights=after_R, minlength=experts).tolist() == tokens.tolist()


def test_one_linear_step_brings_devices_to_the_mean_where_no_replica_runs_empty() -> None:
    rows = [[Replica(d, 0, 0.5), Replica((d + 1) % 5, 0, 0.5)] for d in range(4)] + [[Replica(5, 0)]]
    rows.append([Replica(d, 0, 1 / 3) for d in (0, 2, 4)])
    t = SplitTable(rows, np.array([1.0, 1.1, 1.0, 0.95, 1.0, 3.0]))
    tokens = np.array([40_000, 41_000, 39_000, 40_500, 7, 60_000])
    start_R = t.by_share(tokens)
    time_D = t.time_D(start_R)
    bound = t._closed_sets.bound(tokens, time_D)
    after_D = t.time_D(t._spread.after(start_R, tokens, time_D, bound))
    assert time_D[:5].max() > 1.2 * bound
    assert after_D[:5].max() <= 1.01 * bound
    assert after_D[5] == 21.0


def test_no_tokens_and_single_replicas() -> None:
    t = SplitTable([[Replica(0, 0)], [Replica(1, 0)]], np.ones(2))
    assert split(t, np.array([0, 0])).tolist() == [0, 0]
    assert split(t, np.array([5, 7])).tolist() == [5, 7]
    assert best_split_lp(t, np.array([0, 0]))[0] == 0.0


def test_bad_tables_are_refused() -> None:
    with pytest.raises(OperatorError, match="token_s_D"):
        SplitTable([[Replica(0, 0)]], np.array([0.0]))
    with pytest.raises(OperatorError, match="device: 3; expected below 1"):
        SplitTable([[Replica(3, 0)]], np.array([1.0]))
    with pytest.raises(OperatorError, match="fixed_s_D"):
        SplitTable([[Replica(0, 0)]], np.array([1.0]), np.zeros(2))
