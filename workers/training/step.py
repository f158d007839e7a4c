"""One optimizer step: a function of weights, rows and the step's number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import Recipe
from .model import Decoder
from .optim import rate


@dataclass(frozen=True)
class StepResult:
    """What one step saw.

    Parameters
    ----------
    bits_per_byte : float
        Cross-entropy of the batch before the update, base 2.
    grad_norm : float
        Global norm before clipping.
    counts_LE : list of Tensor
        Tokens per layer and expert.
    """

    bits_per_byte: float
    grad_norm: float
    counts_LE: list[Tensor]


def compute_gradients(model: Decoder, rows_BL: Tensor, recipe: Recipe) -> tuple[float, list[Tensor]]:
    """Leave the loss's gradients in the parameters; return the cross-entropy in bits and the routers' counts.

    Parameters
    ----------
    rows_BL : Tensor
        Token ids (B, length + 1); position t predicts position t + 1.
    """
    out = model(rows_BL[:, :-1])
    cross_entropy = nn.functional.cross_entropy(out.logits_TV, rows_BL[:, 1:].reshape(-1))
    loss = cross_entropy
    for router in out.routers:
        loss = loss + recipe.balance_loss * router.balance_loss + recipe.z_loss * router.z_loss
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    return cross_entropy.item() / math.log(2), [r.counts_E for r in out.routers]


def train_step(
    model: Decoder, optimizer: torch.optim.Optimizer, rows_BL: Tensor, recipe: Recipe, step: int
) -> StepResult:
    """Update ``model`` once, at the learning rates of ``step``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * rate(recipe, step)
    bits, counts_LE = compute_gradients(model, rows_BL, recipe)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
    optimizer.step()
    return StepResult(bits, norm.item(), counts_LE)
