"""The experts of one layer: a plain reference and the kernels that replace it.

Shapes: T tokens, H hidden, K chosen experts per token, N = choices served here, E local experts, I inner width. Every
kernel is called

    y_TH = kernel(x_TH, ids_TK, weights_TK, w13, w2)

with ``ids_TK`` int64 local slots (-1: that choice is served elsewhere and counts nothing), ``weights_TK`` float32,
``w13[e]`` [2I, H] (gate above up) and ``w2[e]`` [H, I], each contiguous, the experts anywhere in memory: a list of
views or one tensor. The result is new, of ``x_TH``'s type:

    y_t = sum over k of  weights_tk * w2[e] (silu(gate_e x_t) * (up_e x_t)),   e = ids_tk
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .capabilities import float32_is_faster

ExpertWeights = Sequence[Tensor] | Tensor
MoeKernel = Callable[[Tensor, Tensor, Tensor, ExpertWeights, ExpertWeights], Tensor]


def select_moe_kernel(device_type: str, dtype: torch.dtype) -> MoeKernel:
    """The fastest kernel for a device type (``"cpu"``, ``"cuda"``, ...) and data type.

    Native kernels are chosen here; whoever runs experts asks here and nowhere else.
    """
    return widening_moe if float32_is_faster(device_type, dtype) else fused_moe


def moe_reference(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: ExpertWeights, w2: ExpertWeights) -> Tensor:
    """The definition, one token and choice at a time, summed in float32."""
    y_TH = torch.zeros_like(x_TH, dtype=torch.float32)
    for t, choices in enumerate(ids_TK.tolist()):
        for k, e in enumerate(choices):
            if e >= 0:
                gate, up = functional.linear(x_TH[t], w13[e]).chunk(2, dim=-1)
                y_TH[t] += weights_TK[t, k] * functional.linear(functional.silu(gate) * up, w2[e]).float()
    return y_TH.to(x_TH.dtype)


def silu_mul(h_N2I: Tensor) -> Tensor:
    """``silu(gate) * up`` of rows [gate; up]."""
    gate, up = h_N2I.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def fused_moe(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: ExpertWeights, w2: ExpertWeights) -> Tensor:
    """Choices sorted by expert, two products per expert that has any, everything else once for all."""
    if x_TH.shape[0] == 1:
        return _one_token(x_TH, ids_TK, weights_TK, w13, w2)
    return _sorted(x_TH, (ids_TK, weights_TK), (w13, w2), widen=False)


def widening_moe(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: ExpertWeights, w2: ExpertWeights) -> Tensor:
    """As `fused_moe`, but where experts have enough tokens, weights are widened to float32 as they are used."""
    if x_TH.shape[0] == 1:
        return _one_token(x_TH, ids_TK, weights_TK, w13, w2)
    return _sorted(x_TH, (ids_TK, weights_TK), (w13, w2), widen=True)


def _sorted(
    x_TH: Tensor, routes: tuple[Tensor, Tensor], experts: tuple[ExpertWeights, ExpertWeights], widen: bool
) -> Tensor:
    (ids_TK, weights_TK), (w13, w2) = routes, experts
    ids_N, order_N = ids_TK.flatten().sort(stable=True)
    ids, counts, absent = _runs(ids_N)
    if not ids:
        return torch.zeros_like(x_TH)
    order_N = order_N[absent:]
    token_N = order_N // ids_TK.shape[1]
    multiply = _Widen() if widen and _repays(w13[0], sum(counts) / len(ids)) else _multiply
    x_NH = (x_TH.float() if multiply is not _multiply else x_TH).index_select(0, token_N)
    h_N2I = x_NH.new_empty(x_NH.shape[0], w13[0].shape[0])
    for e, x, h in zip(ids, torch.split(x_NH, counts), torch.split(h_N2I, counts), strict=True):
        multiply(x, w13[e], h)
    g_NI = silu_mul(h_N2I)
    y_NH = x_NH  # whose values are not needed any more
    for e, g, y in zip(ids, torch.split(g_NI, counts), torch.split(y_NH, counts), strict=True):
        multiply(g, w2[e], y)
    weight_N1 = weights_TK.flatten().index_select(0, order_N).unsqueeze(1)
    sum_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    return sum_TH.index_add_(0, token_N, y_NH.float().mul_(weight_N1)).to(x_TH.dtype)


def _runs(sorted_ids: Tensor) -> tuple[list[int], list[int], int]:
    """Experts that occur, how often, and how many choices are absent (-1; they come first)."""
    found, often = torch.unique_consecutive(sorted_ids, return_counts=True)
    ids, counts = found.tolist(), often.tolist()
    if ids and ids[0] < 0:
        return ids[1:], counts[1:], counts[0]
    return ids, counts, 0


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.mm(x, weight.t(), out=out)


def _repays(weight: Tensor, rows: float) -> bool:
    """Whether widening pays at so many rows per expert: early if the copy stays in a core's second-level cache."""
    return rows >= (4 if weight.numel() <= 1 << 18 else 64)


class _Widen:
    """`_multiply` of float32 by narrower weights, with one scratch for all weights of a call."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0, dtype=torch.float32)

    def __call__(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        if self._scratch.numel() < weight.numel():
            self._scratch = torch.empty(weight.numel(), dtype=torch.float32)
        wide = self._scratch[: weight.numel()].view(weight.shape).copy_(weight)
        torch.mm(x, wide.t(), out=out)


def _one_token(x_1H: Tensor, ids_1K: Tensor, weights_1K: Tensor, w13: ExpertWeights, w2: ExpertWeights) -> Tensor:
    chosen = [(k, e) for k, e in enumerate(ids_1K[0].tolist()) if e >= 0]
    if not chosen:
        return torch.zeros_like(x_1H)
    g_KI = silu_mul(torch.cat([functional.linear(x_1H, w13[e]) for _, e in chosen]))
    rows = g_KI.split(1)
    y_KH = torch.cat([functional.linear(g, w2[e]) for g, (_, e) in zip(rows, chosen, strict=True)])
    if len(chosen) < weights_1K.shape[1]:
        weights_1K = weights_1K[:, [k for k, _ in chosen]]
    return torch.mm(weights_1K, y_KH.float()).to(x_1H.dtype)
