"""The experts of one layer: a plain reference and the kernels that replace it.

Shapes: T tokens, H hidden, K chosen experts per token, E local experts, I inner width. Every kernel is called

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

ExpertWeights = Sequence[Tensor] | Tensor
MoeKernel = Callable[[Tensor, Tensor, Tensor, ExpertWeights, ExpertWeights], Tensor]


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
    """Tokens sorted by expert, two multiplications per expert that has any, everything else once for all."""
    T, K = ids_TK.shape
    H, inner = x_TH.shape[1], w2[0].shape[1] if len(w2) else 0
    if T == 1:
        return _one_token(x_TH, ids_TK, weights_TK, w13, w2)
    flat = ids_TK.reshape(-1)
    sorted_ids, order = flat.sort(stable=True)
    runs = _runs(sorted_ids)
    if not runs:
        return torch.zeros_like(x_TH)
    x_NH = x_TH[order // K]
    h_N2I = x_NH.new_empty(T * K, 2 * inner)
    for e, begin, end in runs:
        torch.mm(x_NH[begin:end], w13[e].t(), out=h_N2I[begin:end])
    first = runs[0][1]
    g_NI = silu_mul(h_N2I[first:])
    y_NH = torch.zeros_like(x_NH) if first else torch.empty_like(x_NH)
    for e, begin, end in runs:
        torch.mm(g_NI[begin - first : end - first], w2[e].t(), out=y_NH[begin:end])
    y_TKH = torch.empty_like(y_NH).index_copy_(0, order, y_NH).view(T, K, H)
    return torch.bmm(weights_TK.to(x_TH.dtype).unsqueeze(1), y_TKH).squeeze(1)


def _runs(sorted_ids: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) for every expert that occurs; absent choices (-1) come first and are left out."""
    ids, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    runs, begin = [], 0
    for e, n in zip(ids.tolist(), counts.tolist(), strict=True):
        if e >= 0:
            runs.append((e, begin, begin + n))
        begin += n
    return runs


def _one_token(x_1H: Tensor, ids_1K: Tensor, weights_1K: Tensor, w13: ExpertWeights, w2: ExpertWeights) -> Tensor:
    chosen = [(k, e) for k, e in enumerate(ids_1K[0].tolist()) if e >= 0]
    if not chosen:
        return torch.zeros_like(x_1H)
    h_K2I = torch.cat([torch.mm(x_1H, w13[e].t()) for _, e in chosen])
    g_KI = silu_mul(h_K2I)
    y_KH = torch.cat([torch.mm(g_KI[i : i + 1], w2[e].t()) for i, (_, e) in enumerate(chosen)])
    weights = weights_1K if len(chosen) == weights_1K.shape[1] else weights_1K[:, [k for k, _ in chosen]]
    return torch.mm(weights.to(x_1H.dtype), y_KH)


def select_moe_kernel(device_type: str, dtype: torch.dtype) -> MoeKernel:
    """The fastest kernel here for a device type (``"cpu"``, ``"cuda"``, ...) and data type.

    Native kernels are chosen here; whoever runs experts asks here and nowhere else.
    """
    return fused_moe
