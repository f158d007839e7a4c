"""The planners' split of replicated experts' tokens, called by the expert exchange on every batch's counts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..planners.placement import Placement
from ..planners.split import SplitTable, split

LEAST_PAIRS = 64  # pairs of token and expert: with fewer the split costs more than it gives


class BatchSplit:
    """A `workers.exchange.parallel.Split` that evens out the devices' work (planners/README.md, eq. 6).

    Every worker splits its own tokens; that is also even in sum, as all of them see the same devices.

    Parameters
    ----------
    placement : Placement
    token_s_D : sequence of float, optional
        Relative seconds per token of each device; equal by default.
    """

    def __init__(self, placement: Placement, token_s_D: tuple[float, ...] | None = None) -> None:
        rates = np.asarray(token_s_D if token_s_D is not None else [1.0] * len(placement.devices))
        self._tables = [SplitTable(replicas, rates) for replicas in placement.replicas_LE]
        self._shapes = [_shape(table) for table in self._tables]

    def __call__(self, layer: int, counts_E: Tensor) -> Tensor | None:
        """Shares [E, J], 0 where an expert has fewer than J replicas; None for a small batch."""
        counts = counts_E.numpy()
        if counts.sum() < LEAST_PAIRS:
            return None
        table, (place_R, shares_EJ) = self._tables[layer], self._shapes[layer]
        tokens_R = split(table, counts)
        out = shares_EJ.copy()
        busy_R = counts[table.expert_R] > 0
        e, j = table.expert_R[busy_R], place_R[busy_R]
        out[e, j] = tokens_R[busy_R] / counts[e]
        return torch.from_numpy(out)


def _shape(table: SplitTable) -> tuple[np.ndarray, np.ndarray]:
    """Position of every replica among its expert's, and the placement's own shares [E, J]."""
    widths = [len(replicas) for replicas in table.replicas_E]
    place_R = np.concatenate([np.arange(width) for width in widths])
    shares_EJ = np.zeros((len(widths), max(widths)))
    shares_EJ[table.expert_R, place_R] = [r.share for replicas in table.replicas_E for r in replicas]
    return place_R, shares_EJ
