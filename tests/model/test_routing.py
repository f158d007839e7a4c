"""Routing by its definition, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from concertina.kernels.routing import sigmoid_group_top_k, softmax_top_k


def scores(T: int, E: int, seed: int) -> torch.Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("T", "E", "K"), [(0, 4, 2), (1, 1, 1), (63, 7, 3), (5, 9, 9)])
def test_softmax(T: int, E: int, K: int, normalise: bool) -> None:
    logits = scores(T, E, 0)
    ids, weights = softmax_top_k(logits, K, normalise)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert ids.shape == weights.shape == (T, K)
    for row, chosen, given in zip(logits.tolist(), ids.tolist(), weights.tolist(), strict=True):
        best = sorted(range(E), key=lambda e: -row[e])[:K]
        assert sorted(chosen) == sorted(best)
        total = sum(math.exp(row[e]) for e in (best if normalise else range(E)))
        assert given == pytest.approx([math.exp(row[e]) / total for e in chosen], rel=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("groups", "topk_groups"), [(1, 1), (4, 1), (4, 3), (4, 4), (2, 1)])
def test_sigmoid_with_groups(groups: int, topk_groups: int, normalise: bool) -> None:
    T, E, K = 63, 8, 2
    logits, bias = scores(T, E, 1), scores(1, E, 2)[0] / 3
    ids, weights = sigmoid_group_top_k(logits, bias, K, groups, topk_groups, normalise)
    size = E // groups
    for row, chosen, given in zip(logits.tolist(), ids.tolist(), weights.tolist(), strict=True):
        score = [1 / (1 + math.exp(-v)) for v in row]
        biased = [s + b for s, b in zip(score, bias.tolist(), strict=True)]
        worth = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        open_groups = sorted(range(groups), key=lambda g: -worth[g])[:topk_groups]
        allowed = [e for e in range(E) if e // size in open_groups]
        assert sorted(chosen) == sorted(sorted(allowed, key=lambda e: -biased[e])[:K])
        total = sum(score[e] for e in chosen) if normalise else 1.0
        assert given == pytest.approx([score[e] / total for e in chosen], rel=1e-5)
