"""Which replica serves which token: a placement as tensors, and a deterministic choice that follows shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InternalError
from ...planners.placement import Replica

# 2^64 divided by the golden ratio, as a signed 64-bit integer: multiples of it, modulo 2^64, are the Kronecker sequence
# of the golden ratio, whose first n terms fill the unit interval more evenly than those of any other irrational
# (Knuth, The Art of Computer Programming 3, section 6.4, theorem S).
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


@dataclass(frozen=True, slots=True)
class LayerRoutes:
    """Replicas of one layer's experts, J at most each; row E (reached as -1) stands for "no expert".

    ``rank_EJ`` and ``slot_EJ`` hold -1 where there is no replica; ``share_EJ`` (float64) holds 0 there.
    """

    rank_EJ: Tensor
    slot_EJ: Tensor
    share_EJ: Tensor

    @property
    def replicated(self) -> bool:
        return self.rank_EJ.shape[1] > 1

    def places(self, ids_TK: Tensor, replica_TK: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rank and slot of each pair, of the only replica or of the given ones."""
        if replica_TK is None:
            return self.rank_EJ.view(-1)[ids_TK], self.slot_EJ.view(-1)[ids_TK]
        return self.rank_EJ[ids_TK, replica_TK], self.slot_EJ[ids_TK, replica_TK]


def layer_routes(replicas_E: Sequence[Sequence[Replica]], device: torch.device) -> LayerRoutes:
    """Tables of one layer, on ``device``."""
    width = max((len(replicas) for replicas in replicas_E), default=1)

    def table(value: Callable[[Replica], float], absent: float, dtype: torch.dtype) -> Tensor:
        rows = [[*map(value, replicas), *[absent] * (width - len(replicas))] for replicas in replicas_E]
        return torch.tensor([*rows, [absent] * width], dtype=dtype, device=device)

    return LayerRoutes(
        table(lambda r: r.device, -1, torch.int64),
        table(lambda r: r.slot, -1, torch.int64),
        table(lambda r: r.share, 0, torch.float64),
    )


def count_pairs(ids_TK: Tensor, experts: int) -> Tensor:
    """int64 [1 + E]: pairs without expert (id -1), then pairs of each expert.

    Raises
    ------
    InternalError
        An id outside -1..E-1.
    """
    try:
        counts = torch.bincount(ids_TK.flatten() + 1, minlength=experts + 1)
    except RuntimeError as e:  # a negative number
        raise InternalError(f"experts: expected ids in -1..{experts - 1}, got {int(ids_TK.min())}") from e
    if counts.numel() > experts + 1:
        raise InternalError(f"experts: expected ids in -1..{experts - 1}, got {int(ids_TK.max())}")
    return counts


def choose_replicas(routes: LayerRoutes, ids_TK: Tensor, counts: Tensor, seen_E: Tensor, offset: float) -> Tensor:
    """Replica index of every routed (token, expert) pair.

    The n pairs of an expert get the points ``(phase + i / n) mod 1`` in token order, and a replica serves those
    that fall into its part of the unit interval: within a batch it is less than one pair off its share. The
    phase is the golden-ratio sequence at the number of pairs routed before, so that shares also hold over many
    batches of one pair each.

    Parameters
    ----------
    ids_TK : Tensor
        Logical experts; -1 for none.
    counts : Tensor
        Their `count_pairs`.
    seen_E : Tensor
        int64, pairs of each expert routed before this batch.
    offset : float
        In [0, 1); different for each rank, lest all choose the same replica in the same step.

    Returns
    -------
    Tensor
        int64 [T, K], indices into the tables' axis J.
    """
    flat = ids_TK.flatten()
    order = torch.argsort(flat, stable=True)
    run_begins = torch.cumsum(counts, 0) - counts
    within = torch.empty_like(flat)
    within[order] = torch.arange(flat.numel(), device=flat.device) - run_begins[flat[order] + 1]
    phase_E = ((seen_E * _GOLDEN) >> 32 & 0xFFFFFFFF) * 2.0**-32
    phase = torch.cat([phase_E.new_zeros(1), phase_E.double()])
    point = (phase[flat + 1] + offset + within / counts[flat + 1].double()) % 1.0
    # a replica's upper bound is open; the last one has none, so that rounding cannot leave a point without replica
    upper_EJ = torch.cumsum(routes.share_EJ, 1)[:, :-1]
    return (point[:, None] >= upper_EJ[flat]).sum(1).view_as(ids_TK)


def with_shares(routes: LayerRoutes, share_EJ: Tensor) -> LayerRoutes:
    """``routes`` with other shares (float, [E, J], 0 where there is no replica, rows summing to 1)."""
    expected = (routes.share_EJ.shape[0] - 1, routes.share_EJ.shape[1])
    if tuple(share_EJ.shape) != expected:
        raise InternalError(f"split: expected shares of shape {expected}, got {tuple(share_EJ.shape)}")
    share = share_EJ.to(routes.share_EJ)
    off = (share.sum(1) - 1).abs() > 1e-6
    if off.any() or (share < 0).any() or (share[routes.rank_EJ[:-1] < 0] != 0).any():
        raise InternalError("split: expected shares of at least 0 that sum to 1 over each expert's replicas")
    return LayerRoutes(routes.rank_EJ, routes.slot_EJ, torch.cat([share, share.new_zeros(1, share.shape[1])]))
