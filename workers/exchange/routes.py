"""Which replica serves which token: a placement as tensors, and a deterministic choice that follows shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InternalError, OperatorError
from ...planners.placement import Placement, Replica

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


def layer_routes(
    replicas_E: Sequence[Sequence[Replica]], rank_of_device: Sequence[int], device: torch.device
) -> LayerRoutes:
    """Tables of one layer, on ``device``."""
    width = max((len(replicas) for replicas in replicas_E), default=1)

    def table(value: Callable[[Replica], float], absent: float, dtype: torch.dtype) -> Tensor:
        rows = [[*map(value, replicas), *[absent] * (width - len(replicas))] for replicas in replicas_E]
        return torch.tensor([*rows, [absent] * width], dtype=dtype, device=device)

    return LayerRoutes(
        table(lambda r: rank_of_device[r.device], -1, torch.int64),
        table(lambda r: r.slot, -1, torch.int64),
        table(lambda r: r.share, 0, torch.float64),
    )


def check_ranks(placement: Placement, ranks: Sequence[int], size: int) -> None:
    """Raise `OperatorError` unless ``ranks`` gives each device of the placement a rank of its own."""
    if len(ranks) != len(placement.devices) or len(set(ranks)) != len(ranks):
        raise OperatorError(f"placement: expected one rank for each of {len(placement.devices)} devices, got {ranks}")
    if any(not 0 <= r < size for r in ranks):
        raise OperatorError(f"placement: ranks {list(ranks)}: expected 0..{size - 1}, the members of the exchange")


def choose_replicas(routes: LayerRoutes, ids_TK: Tensor, seen_E: Tensor, offset: float) -> Tensor:
    """Replica index of every routed (token, expert) pair.

    The n pairs of an expert get the points ``(phase + i / n) mod 1`` in token order, and a replica serves those
    that fall into its part of the unit interval: within a batch it is less than one pair off its share. The
    phase is the golden-ratio sequence at the number of pairs routed before, so that shares also hold over many
    batches of one pair each.

    Parameters
    ----------
    ids_TK : Tensor
        Logical experts; -1 for none.
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
    counts = torch.bincount(flat + 1, minlength=seen_E.numel() + 1).roll(-1)  # -1 counts at the end, as in the tables
    order = torch.argsort(flat, stable=True)
    first = torch.cumsum(counts.roll(1), 0) - counts.roll(1)  # start of each expert's run, with -1 in front
    within = torch.empty_like(flat)
    within[order] = torch.arange(flat.numel(), device=flat.device) - first[flat[order] + 1]
    phase = ((seen_E * _GOLDEN) >> 32 & 0xFFFFFFFF).double() / 2**32
    phase = torch.cat([phase, phase.new_zeros(1)]) + offset
    point = (phase[flat] + within / counts[flat]) % 1.0
    upper_EJ = torch.cumsum(routes.share_EJ, 1)[:, :-1]
    # a replica's upper bound is open; the last one has none, so that rounding cannot leave a point without replica
    return (point[:, None] >= upper_EJ[flat]).sum(1).view_as(ids_TK)


def with_shares(routes: LayerRoutes, share_EJ: Tensor, experts: int) -> LayerRoutes:
    """``routes`` with other shares (float, [E, J], 0 where there is no replica, rows summing to 1)."""
    if tuple(share_EJ.shape) != (experts, routes.share_EJ.shape[1]):
        raise InternalError(
            f"split: expected shares of shape {(experts, routes.share_EJ.shape[1])}, got {tuple(share_EJ.shape)}"
        )
    share = share_EJ.to(routes.share_EJ)
    sums = share.sum(1)
    if (share[routes.rank_EJ[:-1] < 0] != 0).any() or (share < 0).any() or ((sums - 1).abs() > 1e-6).any():
        raise InternalError("split: expected shares of at least 0 that sum to 1 over each expert's replicas")
    return LayerRoutes(routes.rank_EJ, routes.slot_EJ, torch.cat([share, share.new_zeros(1, share.shape[1])]))
