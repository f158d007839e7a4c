"""Expert parallelism: every token visits the workers that hold its experts, once each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InternalError
from ...planners.placement import Placement
from .base import Exchange
from .routes import check_ranks, choose_replicas, layer_routes, with_shares

# (layer, x_NH, slots_NK, weights_NK) -> y_NH; slots are this worker's physical experts, -1 for none
LocalKernel = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# (layer, counts_E of this worker's batch) -> share_EJ, or None to keep the placement's shares
Split = Callable[[int, Tensor], Tensor | None]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Rows of one layer's batch, ordered by the rank they go to."""

    token_N: Tensor
    slots_NK: Tensor
    weights_NK: Tensor
    splits: list[int]


class ParallelExperts:
    """The model's `Experts` seam over an exchange.

    All members call each layer in the same order, also without tokens (T = 0, with the right H, K and dtypes).

    Parameters
    ----------
    exchange : Exchange
        Of the generation that ``placement`` belongs to.
    placement : Placement
        Where each expert's replicas are.
    local : callable
        Runs this worker's physical experts: ``local(layer, x_NH, slots_NK, weights_NK) -> y_NH``, with slots in
        int64, -1 for experts that are elsewhere, and weights in float32. It is not called without rows.
    ranks : sequence of int, optional
        Rank of each of the placement's devices; by default a device's index is its rank.
    split : callable, optional
        Asked once per layer and batch for other shares: ``split(layer, counts_E) -> share_EJ`` (replicas in the
        placement's order, 0 where an expert has fewer), or None.
    overlap_tokens : int
        With at least this many own rows, they are computed while the peers' rows travel; with fewer, all rows
        go through one call, since small batches spend their time reading each expert's weights, once per call.

    Attributes
    ----------
    counts_LE : Tensor
        int64, pairs of token and expert that this worker has routed since it began. Never reset: readers
        take differences, and the choice among replicas goes on from here.
    """

    def __init__(
        self, exchange: Exchange, placement: Placement, local: LocalKernel, ranks: Sequence[int] | None = None,
        split: Split | None = None, overlap_tokens: int = 256,
    ) -> None:  # fmt: skip
        ranks = list(range(len(placement.devices))) if ranks is None else list(ranks)
        check_ranks(placement, ranks, exchange.size)
        self._exchange, self._local, self._split = exchange, local, split
        self._overlap_tokens = overlap_tokens
        self._routes = [layer_routes(replicas_E, ranks, torch.device("cpu")) for replicas_E in placement.replicas_LE]
        self._experts = placement.experts
        self.counts_LE = torch.zeros((placement.layers, placement.experts), dtype=torch.int64)

    def __call__(self, layer: int, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum of every token's experts.

        Parameters
        ----------
        layer : int
            Index among the MoE layers.
        x_TH : Tensor
            Hidden states.
        ids_TK : Tensor
            Logical experts, any integer type; -1 for none.
        weights_TK : Tensor
            Their weights.

        Returns
        -------
        Tensor
            [T, H] in ``x_TH``'s dtype. Each worker's partial sum is rounded to that dtype once; partial sums
            are added in float32 in rank order.

        Raises
        ------
        PeerLost
            A member died, hung or left.
        InternalError
            An id outside -1..E-1, or shapes that do not fit.
        """
        rank_TK, slot_TK = self._route(layer, ids_TK.long())
        weights_TK = weights_TK.float()
        if self._exchange.size == 1:
            return self._compute(layer, x_TH, slot_TK, weights_TK)
        return self._spread(layer, x_TH, self._plan(rank_TK, slot_TK, weights_TK))

    def _route(self, layer: int, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Rank and slot of every pair; counts them."""
        routes, seen_E = self._routes[layer], self.counts_LE[layer]
        counts_E = self._count(layer, ids_TK)
        if not routes.replicated:
            replica_TK = torch.zeros_like(ids_TK)
        else:
            shares = self._split(layer, counts_E) if self._split else None
            if shares is not None:
                routes = with_shares(routes, shares, self._experts)
            replica_TK = choose_replicas(routes, ids_TK, seen_E, self._exchange.rank / self._exchange.size)
        seen_E += counts_E
        return routes.rank_EJ[ids_TK, replica_TK], routes.slot_EJ[ids_TK, replica_TK]

    def _count(self, layer: int, ids_TK: Tensor) -> Tensor:
        low = int(ids_TK.min()) if ids_TK.numel() else -1
        counts = torch.bincount(ids_TK.flatten() + 1, minlength=self._experts + 1) if low >= -1 else None
        if counts is None or counts.numel() > self._experts + 1:
            raise InternalError(
                f"experts: layer {layer}: expected ids in -1..{self._experts - 1}, got {low}..{int(ids_TK.max())}"
            )
        return counts[1:]

    def _plan(self, rank_TK: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> _Plan:
        hit_RT = (rank_TK == torch.arange(self._exchange.size).view(-1, 1, 1)).any(-1)
        to_N, token_N = hit_RT.nonzero(as_tuple=True)
        slots_NK = torch.where(rank_TK[token_N] == to_N[:, None], slot_TK[token_N], -1).int()
        return _Plan(token_N, slots_NK, weights_TK[token_N], hit_RT.sum(1).tolist())

    def _spread(self, layer: int, x_TH: Tensor, plan: _Plan) -> Tensor:
        own = slice(sum(plan.splits[: self._exchange.rank]), sum(plan.splits[: self._exchange.rank + 1]))
        if own.stop - own.start < self._overlap_tokens:
            return self._spread_all(layer, x_TH, plan)
        return self._spread_others(layer, x_TH, plan, own)

    def _spread_all(self, layer: int, x_TH: Tensor, plan: _Plan) -> Tensor:
        rows, splits = self._exchange.dispatch(_pack(x_TH, plan), plan.splits)
        part = self._compute(layer, *_unpack(rows, x_TH, plan.slots_NK.shape[1]))
        back = self._exchange.combine(part, splits, plan.splits)
        return _sum(back, plan.token_N, plan.splits, x_TH)

    def _spread_others(self, layer: int, x_TH: Tensor, plan: _Plan, own: slice) -> Tensor:
        """As `_spread_all`, but own rows are not copied and are computed while the others travel."""
        elsewhere = torch.ones(plan.token_N.numel(), dtype=torch.bool)
        elsewhere[own] = False
        sent = [0 if r == self._exchange.rank else n for r, n in enumerate(plan.splits)]
        away = _Plan(plan.token_N[elsewhere], plan.slots_NK[elsewhere], plan.weights_NK[elsewhere], sent)
        pending = self._exchange.begin_dispatch(_pack(x_TH, away), sent)
        own_part = self._compute(layer, x_TH[plan.token_N[own]], plan.slots_NK[own], plan.weights_NK[own])
        rows, splits = pending.wait()
        part = self._compute(layer, *_unpack(rows, x_TH, plan.slots_NK.shape[1]))
        back = self._exchange.combine(part, splits, sent)
        back = torch.cat([back[: own.start], own_part, back[own.start :]])
        return _sum(back, plan.token_N, plan.splits, x_TH)

    def _compute(self, layer: int, x_NH: Tensor, slots_NK: Tensor, weights_NK: Tensor) -> Tensor:
        if x_NH.shape[0] == 0:
            return torch.zeros_like(x_NH)
        return self._local(layer, x_NH, slots_NK.long(), weights_NK).to(x_NH.dtype)


def _pack(x_TH: Tensor, plan: _Plan) -> Tensor:
    """Rows of bytes: hidden state, padding to 8, slots (int32), weights (float32), so that one dispatch carries all."""
    hidden_bytes, row_bytes = _widths(x_TH, plan.slots_NK.shape[1])
    rows = torch.empty((plan.token_N.numel(), row_bytes), dtype=torch.uint8)
    if rows.shape[0] == 0:
        return rows  # tensors without elements may have strides that cannot be viewed as bytes
    rows[:, : x_TH.shape[1] * x_TH.element_size()] = x_TH[plan.token_N].view(torch.uint8)
    k_bytes = 4 * plan.slots_NK.shape[1]
    rows[:, hidden_bytes : hidden_bytes + k_bytes] = plan.slots_NK.view(torch.uint8)
    rows[:, hidden_bytes + k_bytes : hidden_bytes + 2 * k_bytes] = plan.weights_NK.view(torch.uint8)
    return rows


def _unpack(rows: Tensor, like_TH: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states in ``like_TH``'s dtype, slots and weights of packed rows."""
    hidden_bytes, _ = _widths(like_TH, k)
    x = rows[:, : like_TH.shape[1] * like_TH.element_size()].contiguous().view(like_TH.dtype)
    slots = rows[:, hidden_bytes : hidden_bytes + 4 * k].contiguous().view(torch.int32)
    weights = rows[:, hidden_bytes + 4 * k : hidden_bytes + 8 * k].contiguous().view(torch.float32)
    return x, slots, weights


def _widths(x_TH: Tensor, k: int) -> tuple[int, int]:
    hidden_bytes = -(-x_TH.shape[1] * x_TH.element_size() // 8) * 8
    return hidden_bytes, hidden_bytes + 8 * k


def _sum(back_NH: Tensor, token_N: Tensor, splits: Sequence[int], like_TH: Tensor) -> Tensor:
    """Add up the partial sums in rank order, in float32 (float64 stays as it is)."""
    acc = torch.zeros(like_TH.shape, dtype=torch.promote_types(like_TH.dtype, torch.float32))
    start = 0
    for n in splits:
        if n:
            # a rank serves a token once, so no index repeats within a call, and the order of additions is fixed
            acc.index_add_(0, token_N[start : start + n], back_NH[start : start + n].to(acc.dtype))
            start += n
    return acc.to(like_TH.dtype)
