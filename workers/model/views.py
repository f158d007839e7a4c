"""Tensors over raw bytes, as `families.layout` lays them out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..families.base import ModelConfig
from ..families.layout import Layout, Slot, expert_layout, trunk_layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def view(extent_u8: Tensor, slot: Slot) -> Tensor:
    """The tensor that lies at ``slot`` of an extent (a contiguous uint8 tensor); shares its memory."""
    count = math.prod(slot.shape)
    dtype = DTYPES[slot.dtype]
    return extent_u8[slot.offset : slot.offset + count * dtype.itemsize].view(dtype).view(slot.shape)


def views(extent_u8: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Every tensor of an extent by name."""
    return {name: view(extent_u8, slot) for name, slot in layout.slots.items()}


def trunk_views(extent_u8: Tensor, config: ModelConfig, dtype: str) -> dict[str, Tensor]:
    """The trunk's tensors by the decoder's parameter names."""
    return views(extent_u8, trunk_layout(config, dtype))


def expert_views(extent_u8: Tensor, config: ModelConfig, dtype: str) -> tuple[Tensor, Tensor]:
    """One expert's ``w13`` [2I, H] and ``w2`` [H, I]."""
    tensors = views(extent_u8, expert_layout(config, dtype))
    return tensors["gate_up"], tensors["down"]
