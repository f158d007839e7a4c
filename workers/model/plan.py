"""What attention needs to know of a batch, worked out once per forward pass and used by every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InternalError
from .batch import Batch


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one new token each and KV of similar length, attended to in one go.

    Parameters
    ----------
    rows_S : Tensor or None
        Their rows of the batch; None: they are the batch, in order.
    tables_SB : Tensor
        KV blocks, int64, padded with the sequence's own.
    mask_S11L : Tensor
        0 where a token may look, -inf elsewhere, of the model's type; L = B * block_tokens.
    """

    rows_S: Tensor | None
    tables_SB: Tensor
    mask_S11L: Tensor


@dataclass(frozen=True, slots=True)
class Prefill:
    """Several new tokens of one sequence: rows ``begin : end``, after ``context`` tokens in the KV cache.

    ``mask_NL`` [new, context + new] is None where plain causal masking of the new tokens alone will do; then
    ``context`` is 0. ``table_1B`` lists the blocks that hold all of it.
    """

    begin: int
    end: int
    context: int
    table_1B: Tensor
    mask_NL: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where each new token's KV goes, and who attends to what.

    ``fresh``: blocks that get their first tokens and are not filled. They must be cleared first: what a page held
    before may read as NaN, and a masked value is weighed with 0, which does not stop a NaN.
    """

    blocks_T: Tensor
    places_T: Tensor
    fresh: tuple[int, ...]
    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[Prefill, ...]


@dataclass(frozen=True, slots=True)
class PlanRules:
    """What the plan depends on besides the batch."""

    block_tokens: int
    sliding_window: int | None
    dtype: torch.dtype
    device: torch.device


def make_plan(batch: Batch, positions_T: Tensor, rules: PlanRules) -> AttentionPlan:
    """Sort the batch's sequences into groups of decodes and single prefills.

    Raises
    ------
    InternalError
        A block table is too short for its sequence.
    """
    counts = [e - b for b, e in zip(batch.query_start, batch.query_start[1:], strict=False)]
    lengths = [c + n for c, n in zip(batch.context_S, counts, strict=True)]
    tables_SB = _tables(batch, lengths, rules)
    sequence_T = torch.repeat_interleave(torch.tensor(counts, device=rules.device)) if batch.tokens else positions_T
    blocks_T = tables_SB[sequence_T, positions_T // rules.block_tokens]
    singles = [s for s, n in enumerate(counts) if n == 1]
    decodes = [_decodes(batch, group, lengths, tables_SB, rules) for group in _similar(singles, lengths)]
    prefills = [_prefill(batch, s, lengths[s], tables_SB, rules) for s, n in enumerate(counts) if n > 1]
    fresh = tuple(_fresh(batch, lengths, rules.block_tokens))
    return AttentionPlan(blocks_T, positions_T % rules.block_tokens, fresh, tuple(decodes), tuple(prefills))


def _fresh(batch: Batch, lengths: Sequence[int], block_tokens: int) -> Iterator[int]:
    for context, length, table in zip(batch.context_S, lengths, batch.block_tables, strict=True):
        last, filled = divmod(length, block_tokens)
        if filled and last * block_tokens >= context:
            yield table[last]


def _blocks(length: int, rules: PlanRules) -> int:
    return -(-length // rules.block_tokens)


def _tables(batch: Batch, lengths: Sequence[int], rules: PlanRules) -> Tensor:
    """Block tables padded to the longest with each sequence's last block: masked, and finite if the sequence is."""
    needs = [_blocks(length, rules) for length in lengths]
    widest = max(needs, default=1)
    rows = []
    for s, (table, need) in enumerate(zip(batch.block_tables, needs, strict=True)):
        if len(table) < need:
            raise InternalError(
                f"batch: sequence {s}: {lengths[s]} tokens need {need} KV blocks, its table has {len(table)}"
            )
        rows.append([*table[:need], *[table[need - 1]] * (widest - need)])
    return torch.tensor(rows, dtype=torch.int64, device=rules.device).view(-1, widest)


def _similar(singles: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Groups whose lengths differ by less than twice (up to 128 tokens: one group), so that padding stays small."""
    groups: dict[int, list[int]] = {}
    for s in singles:
        groups.setdefault(max((lengths[s] - 1).bit_length(), 7), []).append(s)
    return list(groups.values())


def _decodes(
    batch: Batch, group: Sequence[int], lengths: Sequence[int], tables_SB: Tensor, rules: PlanRules
) -> DecodeGroup:
    everyone = len(group) == batch.tokens
    index = torch.tensor(group, device=rules.device)
    blocks = max(_blocks(lengths[s], rules) for s in group)
    length_S1 = torch.tensor([[lengths[s]] for s in group], device=rules.device)
    place_L = torch.arange(blocks * rules.block_tokens, device=rules.device)
    hidden = place_L >= length_S1
    if rules.sliding_window is not None:
        hidden |= place_L < length_S1 - rules.sliding_window
    rows = None if everyone else torch.tensor([batch.query_start[s] for s in group], device=rules.device)
    tables = tables_SB[:, :blocks] if everyone else tables_SB[index, :blocks]
    return DecodeGroup(rows, tables, _minus_infinity(hidden, rules.dtype)[:, None, None])


def _prefill(batch: Batch, s: int, length: int, tables_SB: Tensor, rules: PlanRules) -> Prefill:
    begin, end, context = batch.query_start[s], batch.query_start[s + 1], batch.context_S[s]
    window = rules.sliding_window
    mask = None
    if context or (window is not None and length > window):
        place_L = torch.arange(length, device=rules.device)
        query_N1 = place_L[context:, None]
        hidden = place_L > query_N1
        if window is not None:
            hidden |= place_L <= query_N1 - window
        mask = _minus_infinity(hidden, rules.dtype)
    return Prefill(begin, end, context, tables_SB[s : s + 1, : _blocks(length, rules)], mask)


def _minus_infinity(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
