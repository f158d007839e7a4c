"""Products with weights stored as [outputs, inputs]. Shapes: T rows, O outputs, I inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .capabilities import float32_is_faster

_MIN_ROWS = 64  # fewer do not repay widening the weights
_MAX_WIDENED = 1 << 22  # elements widened at a time: 16 MiB of float32


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in ``x``'s type."""
    if x_TI.shape[0] < _MIN_ROWS or not float32_is_faster(x_TI.device.type, x_TI.dtype):
        return functional.linear(x_TI, weight_OI, bias_O)
    y_TO = _widened(x_TI, weight_OI)
    return (y_TO if bias_O is None else y_TO.add_(bias_O)).to(x_TI.dtype)


def add_linear(residual_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """``residual + x @ weight.T``, rounded once."""
    if x_TI.shape[0] < _MIN_ROWS or not float32_is_faster(x_TI.device.type, x_TI.dtype):
        return torch.addmm(residual_TO, x_TI, weight_OI.t())
    return _widened(x_TI, weight_OI).add_(residual_TO).to(x_TI.dtype)


def _widened(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """The product in float32, some outputs at a time so that little memory is needed."""
    wide_TI = x_TI.float()
    step = max(1, _MAX_WIDENED // weight_OI.shape[1])
    if step >= weight_OI.shape[0]:
        return torch.mm(wide_TI, weight_OI.float().t())
    y_TO = wide_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])
    for begin in range(0, weight_OI.shape[0], step):
        y_TO[:, begin : begin + step] = torch.mm(wide_TI, weight_OI[begin : begin + step].float().t())
    return y_TO
