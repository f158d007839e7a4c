"""Where every weight lies in its extent, in bytes, and which checkpoint tensor goes there.

An expert is gate [I, H], up [I, H], down [H, I] one behind the other, so that gate and up are one [2I, H] matrix. The
trunk is every `TrunkTensor` at a multiple of 64 bytes, its parts one behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Protocol

from ...errors import OperatorError
from ..generation import TRUNK_KEY, expert_key
from .base import DTYPE_BYTES, ModelConfig, TensorSpec
from .registry import family_of

ALIGNMENT = 64


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element.

    Raises
    ------
    OperatorError
        A data type that models here cannot have.
    """
    if dtype not in DTYPE_BYTES:
        raise OperatorError(f"dtype: expected one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    return DTYPE_BYTES[dtype]


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to the alignment of tensors in pages."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor's place in an extent: first byte, shape and data type."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Layout:
    """Every tensor of an extent by name, and the extent's size in bytes."""

    slots: Mapping[str, Slot]
    nbytes: int


def _pack(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> Layout:
    slots, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        slots[name] = Slot(end, shape, dtype)
        end = aligned(end + slots[name].nbytes)
    return Layout(MappingProxyType(slots), end)


@lru_cache(maxsize=16)
def trunk_layout(config: ModelConfig, dtype: str) -> Layout:
    """The trunk's tensors under the decoder's parameter names, for a model run in ``dtype``."""
    dtype_bytes(dtype)
    tensors = family_of(config).trunk(config)
    return _pack({name: (t.shape, t.dtype or dtype) for name, t in tensors.items()})


@lru_cache(maxsize=16)
def expert_layout(config: ModelConfig, dtype: str) -> Layout:
    """``gate_up`` [2I, H] and ``down`` [H, I] of one expert."""
    dtype_bytes(dtype)
    i, h = config.expert_intermediate, config.hidden_size
    return _pack({"gate_up": ((2 * i, h), dtype), "down": ((h, i), dtype)})


def expert_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of one routed expert of one layer."""
    return expert_layout(config, dtype).nbytes


def trunk_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of everything but routed experts."""
    return trunk_layout(config, dtype).nbytes


def kv_token_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of KV cache per token over all layers."""
    return config.attention.kv_width * dtype_bytes(dtype) * config.layers


class CheckpointLike(Protocol):
    """What pieces need of a checkpoint (`workers.checkpoint.Checkpoint` is one)."""

    def __contains__(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Placed:
    """Checkpoint bytes that belong into an extent.

    Parameters
    ----------
    spec : TensorSpec
        The whole checkpoint tensor, under the name it has in this checkpoint.
    key : str
        The extent: ``"trunk"`` or ``"expert/<MoE layer>/<expert>"``.
    offset : int
        Where the elements go, in bytes from the extent's start.
    dtype : str
        Data type they have there.
    index : int or None
        None: the whole tensor. Else only ``tensor[index]`` (an expert of a stacked tensor).
    """

    spec: TensorSpec
    key: str
    offset: int
    dtype: str
    index: int | None = None


def place_trunk(config: ModelConfig, checkpoint: CheckpointLike, dtype: str) -> Iterator[Placed]:
    """All of the trunk, in the order of the layout."""
    layout = trunk_layout(config, dtype)
    for name, tensor in family_of(config).trunk(config).items():
        slot = layout.slots[name]
        offset = slot.offset
        for part in tensor.parts:
            yield Placed(_present(part, checkpoint), TRUNK_KEY, offset, slot.dtype)
            offset += math.prod(part.shape) * DTYPE_BYTES[slot.dtype]


def place_expert(
    config: ModelConfig, checkpoint: CheckpointLike, dtype: str, moe_layer: int, expert: int
) -> Iterator[Placed]:
    """One expert, from its own three tensors or from its layer's stacked two."""
    names, layer = family_of(config).experts, config.moe_layers[moe_layer]
    E, H, i = config.experts, config.hidden_size, config.expert_intermediate
    key, down = expert_key(moe_layer, expert), expert_layout(config, dtype).slots["down"].offset
    stacked = names.stacked_gate_up.format(layer=layer)
    if stacked in checkpoint:
        yield Placed(TensorSpec(stacked, (E, 2 * i, H)), key, 0, dtype, expert)
        stacked_down = TensorSpec(names.stacked_down.format(layer=layer), (E, H, i))
        yield Placed(stacked_down, key, down, dtype, expert)
        return
    half = i * H * DTYPE_BYTES[dtype]
    parts = ((names.gate, (i, H), 0), (names.up, (i, H), half), (names.down, (H, i), down))
    for name, shape, offset in parts:
        yield Placed(TensorSpec(name.format(layer=layer, expert=expert), shape), key, offset, dtype)


def place_all(config: ModelConfig, checkpoint: CheckpointLike, dtype: str) -> Iterator[Placed]:
    """The trunk and every expert of every MoE layer."""
    yield from place_trunk(config, checkpoint, dtype)
    for moe_layer in range(len(config.moe_layers)):
        for expert in range(config.experts):
            yield from place_expert(config, checkpoint, dtype, moe_layer, expert)


def _present(spec: TensorSpec, checkpoint: CheckpointLike) -> TensorSpec:
    if spec.alias is not None and spec.name not in checkpoint and spec.alias in checkpoint:
        return TensorSpec(spec.alias, spec.shape)
    return spec
