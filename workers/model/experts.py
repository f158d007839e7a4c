"""The seam between the decoder and whoever computes routed experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ...kernels.moe import select_moe_kernel

LayerExperts = tuple[Sequence[Tensor], Sequence[Tensor]]


class Experts(Protocol):
    """Routed experts of every MoE layer, wherever they are.

    Called once per MoE layer of every forward pass, with no tokens too: for expert parallelism every worker takes part
    in every layer. ``ids_TK`` int64 logical experts, ``weights_TK`` float32; returns y_TH of ``x_TH``'s type.
    """

    def __call__(self, layer: int, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor: ...


class LocalExperts:
    """All experts of all MoE layers, held here.

    Parameters
    ----------
    layers : sequence of (w13, w2)
        Per MoE layer one ``w13`` [2I, H] and one ``w2`` [H, I] per expert, in order.
    """

    def __init__(self, layers: Sequence[LayerExperts]) -> None:
        self._layers = [(list(w13), list(w2)) for w13, w2 in layers]
        first = next((w13[0] for w13, _ in self._layers), None)
        self._kernel = None if first is None else select_moe_kernel(first.device.type, first.dtype)

    def __call__(self, layer: int, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        assert self._kernel is not None
        w13, w2 = self._layers[layer]
        return self._kernel(x_TH, ids_TK, weights_TK, w13, w2)
