"""SwiGLU experts over tokens sorted by expert, forward and backward.

One expert's rows go through all of its steps before the next expert's begin, so that they stay in the core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Experts(torch.autograd.Function):
    """Sizes: T tokens, K experts of a token, N = T x K rows, D model width, I expert width, G = 2 x I."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_EGD: Tensor, down_EDI: Tensor
    ) -> Tensor:
        order_N = torch.sort(ids_TK.reshape(-1), stable=True).indices
        place_TK = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N))).view_as(ids_TK)
        rows_N = order_N // ids_TK.shape[1]
        x_ND, weights_N = x_TD.index_select(0, rows_N), weights_TK.reshape(-1).index_select(0, order_N)
        gate_up_NG, silu_NI, inner_NI, y_ND = (x_ND.new_empty(len(x_ND), n) for n in _widths(down_EDI))
        ctx.sizes = torch.bincount(ids_TK.reshape(-1), minlength=len(down_EDI)).tolist()
        parts = _by_expert(ctx.sizes, x_ND, gate_up_NG, silu_NI, inner_NI, y_ND)
        for gate_up_GD, down_DI, (x, gate_up, silu, inner, y) in zip(gate_up_EGD, down_EDI, parts, strict=True):
            gate, up = torch.mm(x, gate_up_GD.t(), out=gate_up).chunk(2, dim=1)
            torch.ops.aten.silu.out(gate, out=silu)
            torch.mm(torch.mul(silu, up, out=inner), down_DI.t(), out=y)
        ctx.save_for_backward(
            rows_N, place_TK, weights_N, x_ND, gate_up_NG, silu_NI, inner_NI, y_ND, gate_up_EGD, down_EDI
        )
        return nn.functional.embedding_bag(place_TK, y_ND, mode="sum", per_sample_weights=weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
        rows_N, place_TK, weights_N, *saved, gate_up_EGD, down_EDI = ctx.saved_tensors
        grad_weights_N, grad_x_ND = torch.empty_like(weights_N), torch.empty_like(saved[0])
        grad_gate_up_EGD, grad_down_EDI = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDI)
        parts = _by_expert(ctx.sizes, rows_N, weights_N, *saved, grad_weights_N, grad_x_ND)
        weights = zip(gate_up_EGD, down_EDI, grad_gate_up_EGD, grad_down_EDI, strict=True)
        for (gate_up_GD, down_DI, grad_gate_up_GD, grad_down_DI), part in zip(weights, parts, strict=True):
            rows, weight, x, gate_up, silu, inner, y, grad_weight, grad_x = part
            grad_y = grad_TD.index_select(0, rows)
            torch.linalg.vecdot(grad_y, y, out=grad_weight)
            torch.mm(grad_y.mul_(weight[:, None]).t(), inner, out=grad_down_DI)
            grad_gate_up = _swiglu_backward(grad_y @ down_DI, gate_up, silu)
            torch.mm(grad_gate_up.t(), x, out=grad_gate_up_GD)
            torch.mm(grad_gate_up, gate_up_GD, out=grad_x)
        grad_x_TD = nn.functional.embedding_bag(place_TK, grad_x_ND, mode="sum")
        return grad_x_TD, None, grad_weights_N[place_TK], grad_gate_up_EGD, grad_down_EDI


def _swiglu_backward(grad_I: Tensor, gate_up_G: Tensor, silu_I: Tensor) -> Tensor:
    """Gradient of ``silu(gate) * up`` for gate and up side by side; overwrites ``grad_I``."""
    gate_I, up_I = gate_up_G.chunk(2, dim=1)
    out_G = torch.empty_like(gate_up_G)
    grad_gate_I, grad_up_I = out_G.chunk(2, dim=1)
    torch.mul(grad_I, silu_I, out=grad_up_I)
    torch.ops.aten.silu_backward.grad_input(grad_I.mul_(up_I), gate_I, grad_input=grad_gate_I)
    return out_G


def _by_expert(sizes: list[int], *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of each tensor that belong to expert 0, 1, ..."""
    return zip(*(torch.split(t, sizes) for t in rows), strict=True)


def _widths(down_EDI: Tensor) -> tuple[int, int, int, int]:
    _, width, inner = down_EDI.shape
    return 2 * inner, inner, inner, width


def experts(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_EGD: Tensor, down_EDI: Tensor) -> Tensor:
    """Sum over a token's experts of ``weight * down(silu(gate(x)) * up(x))``.

    Sums over a token's experts run in the order of its choices, never by atomic adds: equal inputs, equal bits.

    Parameters
    ----------
    x_TD : Tensor
        Tokens.
    ids_TK, weights_TK : Tensor
        Each token's experts (int64) and their weights.
    gate_up_EGD, down_EDI : Tensor
        Stacked weights; rows ``[:I]`` of ``gate_up_EGD[e]`` are the gate, rows ``[I:]`` the up projection.

    Returns
    -------
    Tensor
        Shape (T, D).
    """
    out: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        x_TD, ids_TK, weights_TK, gate_up_EGD, down_EDI
    )
    return out
