"""How evenly a router spreads tokens, and the two losses that keep it so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RouterStats(NamedTuple):
    """One layer, one batch: tokens per expert, and the two losses as scalars with gradient."""

    counts_E: Tensor
    balance_loss: Tensor
    z_loss: Tensor


def router_stats(logits_TE: Tensor, probabilities_TE: Tensor, ids_TK: Tensor) -> RouterStats:
    """Statistics of one router's decisions.

    The balance loss is ``E * sum_e f_e P_e`` with f_e the fraction of choices that went to expert e and P_e its mean
    probability (Fedus et al., Switch Transformer, arXiv 2101.03961, eq. 4-6; 1 means even). The z-loss is the mean
    of ``logsumexp(logits)^2`` (Zoph et al., ST-MoE, arXiv 2202.08906, eq. 5). OLMoE weighs them 0.01 and 0.001.
    """
    experts = logits_TE.shape[1]
    counts_E = torch.bincount(ids_TK.reshape(-1), minlength=experts)
    fractions_E = counts_E.to(logits_TE.dtype) / ids_TK.numel()
    balance = experts * torch.dot(fractions_E, probabilities_TE.mean(dim=0))
    return RouterStats(counts_E, balance, torch.logsumexp(logits_TE, dim=-1).square().mean())


def max_over_mean(counts_LE: Sequence[Tensor]) -> list[float]:
    """Per layer, the busiest expert's tokens over the mean; 1 means even."""
    return [float(c.max() / c.double().mean()) for c in counts_LE]
