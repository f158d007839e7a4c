"""Paged KV cache over raw bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import OperatorError
from ..families.base import ModelConfig
from ..families.layout import dtype_bytes
from .views import DTYPES


class KVCache:
    """Blocks of ``block_tokens`` tokens, all layers; within a block layer by layer, token by token.

    A token's entry of a layer is ``config.attention.kv_width`` elements: keys then values of all heads, or latent
    then rope key.

    Parameters
    ----------
    buffer_u8 : Tensor
        Contiguous uint8, at least ``num_blocks * block_bytes`` long.
    block_bytes : int, optional
        Distance between blocks; `block_bytes` of this model or more (whole pages).

    Raises
    ------
    OperatorError
        The buffer or ``block_bytes`` is too small, or ``block_bytes`` is no multiple of the element size.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        buffer_u8: Tensor,
        num_blocks: int,
        block_tokens: int,
        block_bytes: int | None = None,
    ) -> None:
        needed = self.block_bytes(config, dtype, block_tokens)
        stride = needed if block_bytes is None else block_bytes
        item = dtype_bytes(dtype)
        if stride < needed or stride % item:
            raise OperatorError(f"KV block_bytes: expected a multiple of {item}, at least {needed}; got {stride}")
        if buffer_u8.numel() < num_blocks * stride:
            raise OperatorError(
                f"KV buffer: expected {num_blocks} blocks x {stride} bytes, got {buffer_u8.numel()} bytes"
            )
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self.width = config.attention.kv_width
        flat = buffer_u8[: num_blocks * stride].view(DTYPES[dtype])
        self._blocks = flat.as_strided((num_blocks, needed // item), (stride // item, 1))
        layer_items = block_tokens * self.width
        self.layers = [
            flat.as_strided(
                (num_blocks, block_tokens, self.width),
                (stride // item, self.width, 1),
                flat.storage_offset() + layer * layer_items,
            )
            for layer in range(config.layers)
        ]

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: str, block_tokens: int) -> int:
        """Bytes of one block, before rounding up to pages."""
        return config.layers * block_tokens * config.attention.kv_width * dtype_bytes(dtype)

    @classmethod
    def allocate(cls, config: ModelConfig, dtype: str, num_blocks: int, block_tokens: int) -> KVCache:
        """A cache in memory of its own, for tests and tools."""
        nbytes = num_blocks * cls.block_bytes(config, dtype, block_tokens)
        return cls(config, dtype, torch.zeros(nbytes, dtype=torch.uint8), num_blocks, block_tokens)

    def write(self, layer: int, blocks_T: Tensor, places_T: Tensor, entries_TW: Tensor) -> None:
        """Store one entry per token at (block, place within the block)."""
        self.layers[layer].index_put_((blocks_T, places_T), entries_TW)

    def clear(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros; masked entries are multiplied by 0, which does not hide what is not finite."""
        self._blocks.index_fill_(0, torch.tensor(blocks, dtype=torch.int64, device=self._blocks.device), 0.0)

    def gather(self, layer: int, tables_SB: Tensor) -> Tensor:
        """A copy [S, B * block_tokens, width] of the blocks that ``tables_SB`` (int64) lists."""
        blocks = self.layers[layer].index_select(0, tables_SB.flatten())  # 5 times faster than [tables_SB] on CPU
        return blocks.view(tables_SB.shape[0], -1, self.width)
