"""A checkpoint loaded into plain memory, and ways to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from concertina.workers.families.layout import expert_bytes, trunk_bytes
from concertina.workers.generation import TRUNK_KEY, expert_key
from concertina.workers.loading import load_pieces
from concertina.workers.model.batch import Batch, Chunk
from concertina.workers.model.decoder import Decoder
from concertina.workers.model.experts import LocalExperts
from concertina.workers.model.kv import KVCache
from concertina.workers.model.views import expert_views, trunk_views
from concertina.workers.model_files import ModelFiles
from torch import Tensor


@dataclass
class Loaded:
    files: ModelFiles
    decoder: Decoder
    kv: KVCache

    @classmethod
    def open(cls, path: str | Path, dtype: str = "auto", blocks: int = 160, block_tokens: int = 4) -> Loaded:
        files = ModelFiles.open(path, dtype)
        config, E, M = files.config, files.config.experts, len(files.config.moe_layers)
        extents = {TRUNK_KEY: torch.zeros(trunk_bytes(config, files.dtype), dtype=torch.uint8)}
        for m in range(M):
            for e in range(E):
                extents[expert_key(m, e)] = torch.zeros(expert_bytes(config, files.dtype), dtype=torch.uint8)
        buffers = {key: memoryview(extent.numpy()) for key, extent in extents.items()}
        load_pieces(list(files.pieces(extents)), lambda key, at, n: [buffers[key][at : at + n]])
        views = [[expert_views(extents[expert_key(m, e)], config, files.dtype) for e in range(E)] for m in range(M)]
        experts = LocalExperts([([v[0] for v in layer], [v[1] for v in layer]) for layer in views])
        trunk = trunk_views(extents[TRUNK_KEY], config, files.dtype)
        kv = KVCache.allocate(config, files.dtype, blocks, block_tokens)
        return cls(files, Decoder(config, trunk, experts), kv)

    def table(self, first: int, tokens: int) -> list[int]:
        """Blocks for so many tokens, scattered over the cache: 7 apart, beginning at ``first``."""
        count = -(-tokens // self.kv.block_tokens)
        assert self.kv.num_blocks % 7 != 0
        assert count <= self.kv.num_blocks
        return [(first + 7 * i) % self.kv.num_blocks for i in range(count)]

    def logits(self, tokens: Sequence[int], chunk: int | None = None) -> Tensor:
        """Logits after every token of one sequence, fed in pieces of ``chunk`` tokens."""
        table = self.table(3, len(tokens))
        parts = []
        for start in range(0, len(tokens), chunk or len(tokens)):
            piece = list(tokens[start : start + (chunk or len(tokens))])
            batch = Batch.of([Chunk(piece, start, table)])
            every = Batch(
                batch.token_ids_T, batch.positions_T, batch.query_start, batch.context_S, batch.block_tables,
                range(len(piece)),
            )  # fmt: skip
            parts.append(self.decoder.forward(every, self.kv))
        return torch.cat(parts)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The most likely continuation, token by token."""
        tokens, table = list(prompt), self.table(5, len(prompt) + count)
        logits = self.decoder.forward(Batch.of([Chunk(tokens, 0, table)]), self.kv)
        for _ in range(count):
            tokens.append(int(logits.argmax()))
            logits = self.decoder.forward(Batch.of([Chunk(tokens[-1:], len(tokens) - 1, table)]), self.kv)
        return tokens[len(prompt) :]
