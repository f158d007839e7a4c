"""AdamW, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import Recipe

WSD_DECAY = 0.4
"""Part of a warm-up/stable/decay run that decays."""


def rate(recipe: Recipe, step: int) -> float:
    """Part of the peak learning rate in use at ``step``: a linear rise to 1, then the schedule's way down to 0.

    ``linear`` decays to zero all the way (Bergsma et al., arXiv 2502.15938), ``cosine`` along half a cosine
    (Loshchilov & Hutter, arXiv 1608.03983, eq. 5), ``wsd`` holds the peak and decays at the end (Hu et al., MiniCPM,
    arXiv 2404.06395, eq. 1, here with a linear decay).
    """
    rise = recipe.warmup * recipe.steps
    if step < rise:
        return (step + 1) / (rise + 1)
    done = (step - rise) / max(recipe.steps - rise, 1)
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    left = 1 - done
    return left if recipe.schedule == "linear" else min(1.0, left / WSD_DECAY)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); norms and the embedding are not decayed.

    Every group carries its peak learning rate as ``peak_lr``.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        lr = recipe.vocabulary_lr if name.startswith(("embedding", "lm_head")) else recipe.lr
        decay = 0.0 if p.dim() == 1 or name.startswith("embedding") else recipe.weight_decay
        groups.setdefault((lr, decay), []).append(p)
    return torch.optim.AdamW(
        [{"params": ps, "lr": lr, "peak_lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()],
        betas=(recipe.beta1, recipe.beta2),
        eps=1e-9,
        fused=True,
    )
