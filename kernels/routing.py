"""Which experts a token goes to, and with which weights. Shapes: T tokens, E experts, K chosen per token."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_top_k(logits_TE: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """The ``top_k`` most probable experts.

    Returns
    -------
    ids_TK : int64
    weights_TK : float32
        Probabilities over all experts; with ``normalise`` over the chosen ones, so that they sum to 1.
    """
    if normalise:  # softmax over the chosen logits is the renormalised softmax over all of them
        top_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
        return ids_TK, top_TK.softmax(dim=-1, dtype=torch.float32)
    weights_TK, ids_TK = logits_TE.softmax(dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    return ids_TK, weights_TK


def sigmoid_group_top_k(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, groups: int, topk_groups: int, normalise: bool
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's routing without auxiliary loss (arXiv 2412.19437, equations 15 and 16, with groups of experts).

    Scores plus bias choose: first ``topk_groups`` groups by the sum of their two best, then ``top_k`` experts inside.
    The weights are the scores themselves.

    Returns
    -------
    ids_TK : int64
    weights_TK : float32
        Scores in (0, 1); with ``normalise`` divided by their sum.
    """
    scores_TE = logits_TE.float().sigmoid()
    choice_TE = scores_TE + bias_E
    if topk_groups < groups:
        choice_TGE = choice_TE.unflatten(-1, (groups, -1))
        group_TG = choice_TGE.topk(2, dim=-1).values.sum(dim=-1)
        best_TG = group_TG.topk(topk_groups, dim=-1).indices
        closed_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(-1, best_TG, False)
        choice_TE = choice_TGE.masked_fill(closed_TG.unsqueeze(-1), float("-inf")).flatten(-2)
    ids_TK = choice_TE.topk(top_k, dim=-1).indices
    weights_TK = scores_TE.gather(-1, ids_TK)
    if normalise:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return ids_TK, weights_TK
