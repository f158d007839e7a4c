"""What one forward pass is to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of one sequence.

    Parameters
    ----------
    token_ids : sequence of int
        At least one token: a piece of a prompt, or the token sampled last.
    context : int
        Tokens of the sequence that are in the KV cache already.
    blocks : sequence of int
        KV blocks of the sequence in order, enough for context and chunk; more do no harm.
    logits : bool
        Whether the logits after the chunk's last token are wanted.
    """

    token_ids: Sequence[int]
    context: int
    blocks: Sequence[int]
    logits: bool = True


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of several sequences, one sequence behind the other.

    Parameters
    ----------
    token_ids_T, positions_T : Tensor
        int64.
    query_start : sequence of int
        Sequence s has rows ``query_start[s] : query_start[s + 1]``; S + 1 entries, from 0 to T.
    context_S : sequence of int
        Tokens already in the KV cache, per sequence.
    block_tables : sequence of sequences of int
        KV blocks per sequence.
    logits_rows : sequence of int
        Rows whose logits are wanted, in the order wanted.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    query_start: Sequence[int]
    context_S: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    logits_rows: Sequence[int]

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Batch:
        """Put chunks together; logits come in the order of the chunks that want them."""
        tokens: list[int] = []
        positions: list[int] = []
        query_start, rows = [0], []
        for chunk in chunks:
            n = len(chunk.token_ids)
            tokens.extend(chunk.token_ids)
            positions.extend(range(chunk.context, chunk.context + n))
            query_start.append(len(tokens))
            if chunk.logits:
                rows.append(len(tokens) - 1)
        return cls(
            torch.tensor(tokens, dtype=torch.int64),
            torch.tensor(positions, dtype=torch.int64),
            query_start,
            [c.context for c in chunks],
            [c.blocks for c in chunks],
            rows,
        )

    @property
    def tokens(self) -> int:
        return self.query_start[-1]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, context and chunk together; 0 without sequences."""
        lengths = zip(self.context_S, self.query_start, self.query_start[1:], strict=False)
        return max((context + end - begin for context, begin, end in lengths), default=0)
