"""Sampler: against a slow reference, against the distribution it should have, and free of its neighbours (G7)."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from concertina.workers.engine.sampler import Sampled, SampleRow, sample, uniform
from concertina.workers.protocol import SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def row(
    seed: int = 0, position: int = 5, generated: int = 0, stop: tuple[int, ...] = (), **params: object
) -> SampleRow:
    return SampleRow(SamplingParams(**params), seed, position, generated, frozenset(stop))  # type: ignore[arg-type]


def reference(logits: list[float], r: SampleRow) -> dict[int, float]:
    """Probability of every token that may be drawn, in the order in which the cumulative sum runs; plain Python."""
    s = r.sampling
    weights = {i: x for i, x in enumerate(logits) if not (r.masked and i in r.stop_ids)}
    top = max(weights.values())
    if s.temperature == 0:
        return {min(i for i, x in weights.items() if x == top): 1.0}
    probs = {i: math.exp((x - top) / s.temperature) for i, x in weights.items()}
    total = sum(probs.values())
    order = sorted(probs, key=lambda i: (-probs[i], i))
    kept = order[: s.top_k] if s.top_k else order
    mass = sum(probs[i] for i in kept)
    nucleus, before = [], 0.0
    for i in kept:
        if before < s.top_p * mass:
            nucleus.append(i)
        before += probs[i]
    nucleus = [i for i in nucleus if probs[i] >= s.min_p * probs[order[0]]]
    if s.top_k == 0 and s.top_p == 1.0:
        nucleus.sort()
    total = sum(probs[i] for i in nucleus)
    return {i: probs[i] / total for i in nucleus}


def drawn(distribution: dict[int, float], u: float) -> set[int]:
    """The token that u picks; also its neighbours where u is within rounding of the border."""
    tokens, sums, acc = list(distribution), [], 0.0
    for p in distribution.values():
        acc += p
        sums.append(acc)
    return {t for t, low, high in zip(tokens, [0.0, *sums], sums, strict=False) if low - 1e-5 <= u < high + 1e-5}


params = st.builds(
    dict,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.15, 0.55, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.07, 1.0]),
)
# Halves make ties frequent, and no sum of probabilities meets a threshold exactly but by design of `reference`.
logits_lists = st.lists(st.integers(-6, 6).map(lambda x: x / 2), min_size=9, max_size=9)


@settings(max_examples=150, deadline=None)
@given(data=st.lists(st.tuples(logits_lists, params, st.integers(0, 99)), min_size=1, max_size=6))
def test_agrees_with_the_reference(data: list[tuple[list[float], dict[str, float], int]]) -> None:
    rows = [row(seed=seed, stop=(0, 4), min_tokens=seed % 2, **p) for _, p, seed in data]
    results = sample(torch.tensor([logits for logits, _, _ in data]), rows)
    for (logits, _, seed), r, result in zip(data, rows, results, strict=True):
        assert result.token in drawn(reference(logits, r), uniform(seed, r.position))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    vocab=st.sampled_from([300, 1024, 1311, 3000]),
    top_k=st.sampled_from([0, 1, 40, 600, 5000]),
    top_p=st.sampled_from([0.0213, 0.8007, 0.99913]),
    spread=st.sampled_from([0.0, 0.1, 3.0]),
    ties=st.booleans(),
)
def test_wide_rows_agree_with_the_reference(
    seed: int, vocab: int, top_k: int, top_p: float, spread: float, ties: bool
) -> None:
    """More tokens than the sampler looks at first, flat and steep, with ties across that border."""
    logits_RV = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    if ties:
        logits_RV = (logits_RV * 2).round() / 2
    rows = [row(seed=seed + i, top_k=top_k, top_p=top_p, temperature=1.0) for i in range(3)]
    for logits_V, r, result in zip(logits_RV, rows, sample(logits_RV, rows), strict=True):
        assert result.token in drawn(reference(logits_V.tolist(), r), uniform(r.seed, r.position))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), others=st.lists(params, max_size=5), mine=params, place=st.integers(0, 5))
def test_a_row_does_not_depend_on_its_neighbours(
    seed: int, others: list[dict[str, float]], mine: dict[str, float], place: int
) -> None:
    logits_RV = torch.randn(len(others) + 1, 1500, generator=torch.Generator().manual_seed(seed)) * 2
    place %= len(others) + 1
    rows = [row(seed=i, **p) for i, p in enumerate(others)]
    rows.insert(place, row(seed=seed, logprobs=2, **mine))
    together = sample(logits_RV, rows)[place]
    assert sample(logits_RV[place : place + 1].clone(), [rows[place]]) == [together]


def frequencies(logits: Tensor, count: int, **sampling: object) -> Counter[int]:
    rows = [row(seed=i % 7, position=i, **sampling) for i in range(count)]
    return Counter(r.token for r in sample(logits.expand(count, -1), rows) if r.token is not None)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 4},
        {"temperature": 2.0, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_tokens_have_the_right_frequencies(sampling: dict[str, object]) -> None:
    """Chi-squared with fixed seeds; 99.9 % of correct samplers stay below the bound (Wilson-Hilferty quantile)."""
    logits = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.0, 1.9, -3.0, 0.9])
    count = 20000
    expected = reference(logits.tolist(), row(**sampling))
    seen = frequencies(logits, count, **sampling)
    assert set(seen) <= set(expected)
    chi2 = sum((seen[i] - count * p) ** 2 / (count * p) for i, p in expected.items())
    freedom = len(expected) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < bound


def test_random_numbers_are_even_and_independent_between_seeds_and_positions() -> None:
    values = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert len(set(values)) == len(values)
    assert all(0 <= u < 1 for u in values)
    buckets = Counter(int(u * 20) for u in values)
    assert sum((n - 500) ** 2 / 500 for n in buckets.values()) < 43.8  # chi-squared, 19 degrees, 99.9 %
    mean = sum((a - 0.5) * (b - 0.5) for a, b in pairwise(values)) / len(values)
    assert abs(mean) < 4 / 12 / math.sqrt(len(values))


def test_random_numbers_are_the_same_everywhere() -> None:
    """A sequence that moves to another machine must go on as before."""
    assert uniform(0, 0) == 0.0564663990004608
    assert uniform(-1, 7) == uniform(2**64 - 1, 7)


def test_the_largest_random_number_stays_among_kept_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concertina.workers.engine.sampler.uniform", lambda seed, position: 1 - 2**-53)
    logits = torch.tensor([[5.0, 4.0, float("-inf"), float("-inf")]])
    for sampling in ({}, {"top_k": 2}, {"top_p": 0.99}, {"min_p": 0.1}):
        assert sample(logits, [row(**sampling)])[0].token == 1  # type: ignore[arg-type]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0]] * 3)
    rows = [
        row(temperature=0.0, logprobs=2),
        row(temperature=0.2, top_k=1, logprobs=0),
        row(temperature=0.0, logprobs=3, stop=(1,), min_tokens=1),
    ]
    expected = logits[0].log_softmax(0).tolist()
    first, second, third = sample(logits, rows)
    assert first.logprob is not None
    assert first.logprob.logprob == pytest.approx(expected[1])
    assert [i for i, _ in first.logprob.top] == [1, 2]
    assert second.logprob is not None
    assert second.logprob.top == ()
    assert third.token == 2
    assert third.logprob is not None
    assert third.logprob.logprob == pytest.approx(expected[2])
    assert [i for i, _ in third.logprob.top] == [1, 2, 3]
    assert sample(logits[:1], [row(temperature=0.0)]) == [Sampled(1)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_invalid_rows_are_told_apart(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, 300)
    logits[1] = bad
    results = sample(logits, [row(temperature=temperature, top_p=0.9, logprobs=1)] * 3)
    assert results[1] == Sampled(None)
    assert results[0] == results[2]
    assert results[0].token is not None


def test_a_tiny_temperature_is_greedy_and_no_rows_are_no_tokens() -> None:
    logits = torch.tensor([[1.0, 3e4, 2.9e4]])
    for temperature in (1e-4, 1e-30, 5e-324):
        assert sample(logits, [row(temperature=temperature)])[0].token == 1
    assert sample(torch.empty(0, 5), []) == []


def test_logits_are_not_changed() -> None:
    logits = torch.randn(2, 20)
    before = logits.clone()
    sample(logits, [row(stop=(1, 2), min_tokens=3, top_k=3), row(min_p=0.5)])
    assert torch.equal(logits, before)
