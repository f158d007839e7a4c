"""Expert parallelism: every token visits the workers that hold its experts, once each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import OperatorError
from ...planners.placement import Placement
from .base import Exchange
from .routes import choose_replicas, count_pairs, layer_routes, with_shares

# (layer, x_NH, slots_NK, weights_NK) -> y_NH; slots are this worker's physical experts, -1 for none
LocalKernel = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# (layer, counts_E of this worker's batch) -> share_EJ, or None to keep the placement's shares
Split = Callable[[int, Tensor], Tensor | None]
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Batch:
    """Packed rows ordered by the rank they go to, whose tokens they are, and how many go to each rank."""

    rows_NW: Tensor
    token_N: Tensor
    splits: list[int]


class ParallelExperts:
    """The model's `Experts` seam over an exchange.

    All members call each layer in the same order, also without tokens (T = 0, with the right H, K and dtypes).

    Parameters
    ----------
    exchange : Exchange
        Of the generation that ``placement`` belongs to.
    placement : Placement
        Where each expert's replicas are; a device's index is its member's rank.
    local : callable
        Runs this worker's physical experts: ``local(layer, x_NH, slots_NK, weights_NK) -> y_NH``, with slots in
        int64, -1 for experts that are elsewhere, and weights in float32. It is not called without rows.
    split : callable, optional
        Asked once per batch of a layer with replicas for other shares: ``split(layer, counts_E) -> share_EJ``
        (replicas in the placement's order, 0 where an expert has fewer), or None to keep those it has.
    overlap_tokens : int
        With at least this many own rows, they are computed while the peers' rows travel; with fewer, all rows
        go through one call, since small batches spend their time reading each expert's weights, once per call.
    device : torch.device
        Where the model's tensors are.

    Attributes
    ----------
    counts_LE : Tensor
        int64, pairs of token and expert that this worker has routed since it began. Never reset: readers
        take differences, and the choice among replicas goes on from here.

    Raises
    ------
    OperatorError
        The placement has not one device for each member.
    """

    def __init__(
        self, exchange: Exchange, placement: Placement, local: LocalKernel, split: Split | None = None,
        overlap_tokens: int = 256, device: torch.device = CPU,
    ) -> None:  # fmt: skip
        if len(placement.devices) != exchange.size:
            raise OperatorError(
                f"placement: devices: expected one for each of the {exchange.size} members, got {placement.devices}"
            )
        self._exchange, self._local, self._split = exchange, local, split
        self._overlap_tokens = overlap_tokens
        self._routes = [layer_routes(replicas_E, device) for replicas_E in placement.replicas_LE]
        self._rank_R11 = torch.arange(exchange.size, device=device).view(-1, 1, 1)
        self.counts_LE = torch.zeros((placement.layers, placement.experts), dtype=torch.int64, device=device)

    def __call__(self, layer: int, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum of every token's experts.

        Parameters
        ----------
        layer : int
            Index among the MoE layers.
        x_TH : Tensor
            Hidden states.
        ids_TK : Tensor
            Logical experts, any signed integer type; -1 for none.
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
            An id outside -1..E-1, or ``split`` gave no valid shares.
        """
        rank_TK, slot_TK = self._route(layer, ids_TK.long())
        weights_TK = weights_TK.float()
        if self._exchange.size == 1:
            self._exchange.alive_s = time.monotonic()  # no call of its own says that a layer is done
            return self._compute(layer, x_TH, slot_TK, weights_TK)
        batch = self._pack(rank_TK, x_TH, slot_TK, weights_TK)
        begin = sum(batch.splits[: self._exchange.rank])
        own = slice(begin, begin + batch.splits[self._exchange.rank])
        spread = self._overlapping if own.stop - own.start >= self._overlap_tokens else self._together
        back_NH = spread(layer, _Form(x_TH, ids_TK.shape[1]), batch, own)
        return _sum(back_NH, batch, x_TH)

    def _route(self, layer: int, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Rank and slot of every pair; counts them."""
        routes, seen_E = self._routes[layer], self.counts_LE[layer]
        counts = count_pairs(ids_TK, seen_E.numel())
        replica_TK = None
        if routes.replicated:
            shares = self._split(layer, counts[1:]) if self._split else None
            routes = routes if shares is None else with_shares(routes, shares)
            replica_TK = choose_replicas(routes, ids_TK, counts, seen_E, self._exchange.rank / self._exchange.size)
        seen_E += counts[1:]
        return routes.places(ids_TK, replica_TK)

    def _pack(self, rank_TK: Tensor, x_TH: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> _Batch:
        """A row for each token and each rank that serves it; one dispatch carries hidden states, slots and weights."""
        elsewhere_RTK = rank_TK != self._rank_R11
        hit_RT = elsewhere_RTK.all(-1).logical_not_()
        to_N, token_N = hit_RT.nonzero(as_tuple=True)
        row_TW = torch.cat([_words(x_TH), slot_TK.int(), weights_TK.view(torch.int32)], 1)
        rows_NW = row_TW[token_N]
        k = slot_TK.shape[1]
        rows_NW[:, -2 * k : -k].masked_fill_(elsewhere_RTK[to_N, token_N], -1)
        return _Batch(rows_NW, token_N, hit_RT.sum(1).tolist())

    def _together(self, layer: int, form: _Form, batch: _Batch, own: slice) -> Tensor:
        rows_MW, splits = self._exchange.dispatch(batch.rows_NW, batch.splits)
        return self._exchange.combine(self._compute(layer, *form.unpack(rows_MW)), splits, batch.splits)

    def _overlapping(self, layer: int, form: _Form, batch: _Batch, own: slice) -> Tensor:
        """As `_together`, but own rows do not travel and are computed while the others do."""
        rows, rank = batch.rows_NW, self._exchange.rank
        sent = [0 if r == rank else n for r, n in enumerate(batch.splits)]
        pending = self._exchange.begin_dispatch(torch.cat([rows[: own.start], rows[own.stop :]]), sent)
        own_part = self._compute(layer, *form.unpack(rows[own]))
        rows_MW, splits = pending.wait()
        back = self._exchange.combine(self._compute(layer, *form.unpack(rows_MW)), splits, sent)
        return torch.cat([back[: own.start], own_part, back[own.start :]])

    def _compute(self, layer: int, x_NH: Tensor, slots_NK: Tensor, weights_NK: Tensor) -> Tensor:
        if x_NH.shape[0] == 0:
            return torch.zeros_like(x_NH)
        return self._local(layer, x_NH, slots_NK, weights_NK).to(x_NH.dtype)


class _Form:
    """How to read packed rows: hidden state in whole 32-bit words, K slots (int32), K weights (float32)."""

    def __init__(self, like_TH: Tensor, k: int) -> None:
        self._hidden, self._dtype, self._k = like_TH.shape[1], like_TH.dtype, k

    def unpack(self, rows_NW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        words, slots, weights = rows_NW.split([rows_NW.shape[1] - 2 * self._k, self._k, self._k], 1)
        if rows_NW.shape[0] == 0:
            x = words.new_empty((0, self._hidden), dtype=self._dtype)
        else:
            x = words.contiguous().view(self._dtype)[:, : self._hidden].contiguous()
        return x, slots.long(), weights.contiguous().view(torch.float32)


def _words(x_TH: Tensor) -> Tensor:
    """Rows as int32, padded to whole words."""
    per_word = max(1, 4 // x_TH.element_size())
    spare = -x_TH.shape[1] % per_word
    x_TH = pad(x_TH, (0, spare)) if spare else x_TH.contiguous()
    if x_TH.shape[0] == 0:
        return x_TH.new_empty((0, x_TH.shape[1] * x_TH.element_size() // 4), dtype=torch.int32)
    return x_TH.view(torch.int32)


def _sum(back_NH: Tensor, batch: _Batch, like_TH: Tensor) -> Tensor:
    """Add up the partial sums in rank order, in float32 (float64 stays as it is)."""
    acc = torch.zeros(like_TH.shape, dtype=torch.promote_types(like_TH.dtype, torch.float32), device=like_TH.device)
    back_NH = back_NH.to(acc.dtype)
    if acc.device.type == "cpu":
        acc.index_add_(0, batch.token_N, back_NH)  # one row after the other
    else:  # in no fixed order, but a rank serves a token once: one call per rank fixes it
        for tokens, part in zip(batch.token_N.split(batch.splits), back_NH.split(batch.splits), strict=True):
            acc.index_add_(0, tokens, part)
    return acc.to(like_TH.dtype)
