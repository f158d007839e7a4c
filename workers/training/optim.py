"""AdamW, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import Recipe

WSD_DECAY = 0.4
"""Part of a warm-up/stable/decay run that decays."""


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of ``step``: a linear rise to the peak, then the schedule's way down to 0 at the end.

    ``linear`` decays to zero all the way (Bergsma et al., arXiv 2502.15938), ``cosine`` along half a cosine
    (Loshchilov & Hutter, arXiv 1608.03983, eq. 5), ``wsd`` holds the peak and decays at the end (Hu et al., MiniCPM,
    arXiv 2404.06395, eq. 1, here with a linear decay).
    """
    rise = recipe.warmup * recipe.steps
    if step < rise:
        return recipe.lr * (step + 1) / (rise + 1)
    done = (step - rise) / max(recipe.steps - rise, 1)
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))
    left = 1 - done
    return recipe.lr * (left if recipe.schedule == "linear" else min(1.0, left / WSD_DECAY))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); norms and the embedding are not decayed."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and not n.startswith("embedding")]
    others = [p for n, p in model.named_parameters() if p.dim() <= 1 or n.startswith("embedding")]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=1e-9, fused=True)
