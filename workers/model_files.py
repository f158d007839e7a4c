"""A checkpoint that was checked against its family: sizes, and which bytes go to which extent. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import OperatorError
from .checkpoint import Checkpoint
from .families.base import DTYPE_BYTES, ModelConfig
from .families.layout import (
    Placed,
    expert_bytes,
    kv_token_bytes,
    place_all,
    place_expert,
    place_trunk,
    trunk_bytes,
)
from .families.registry import load_config
from .generation import TRUNK_KEY, parse_expert_key
from .loading import Piece

_SAFETENSORS_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk and the data type it runs in.

    Parameters
    ----------
    path : str
        Checkpoint directory.
    config : ModelConfig
    checkpoint : Checkpoint
    dtype : str
        ``bfloat16``, ``float16`` or ``float32``.
    """

    path: str
    config: ModelConfig
    checkpoint: Checkpoint
    dtype: str

    @classmethod
    def open(cls, path: str, dtype: str = "auto") -> ModelFiles:
        """Read ``config.json`` and all headers, and check that every tensor is there with the right shape.

        Raises
        ------
        OperatorError
            Something is missing, malformed, truncated or of an unsupported family or data type; names it.
        """
        checkpoint = Checkpoint.open(path)
        config = load_config(path)
        chosen = config.dtype if dtype == "auto" else dtype
        if chosen not in DTYPE_BYTES:
            raise OperatorError(f"dtype: {chosen!r}; expected auto or one of {', '.join(DTYPE_BYTES)}")
        model = cls(path, config, checkpoint, chosen)
        for placed in place_all(config, checkpoint, chosen):
            model._piece(placed)
        return model

    def pieces(self, keys: Iterable[str]) -> Iterator[Piece]:
        """What to read for extents of weights: the trunk's key and experts' keys."""
        for key in keys:
            if key == TRUNK_KEY:
                placed = place_trunk(self.config, self.checkpoint, self.dtype)
            else:
                placed = place_expert(self.config, self.checkpoint, self.dtype, *parse_expert_key(key))
            yield from map(self._piece, placed)

    def _piece(self, placed: Placed) -> Piece:
        source = self.checkpoint.expect(placed.spec.name, placed.spec.shape)
        if source.dtype not in _SAFETENSORS_DTYPE.values():
            raise OperatorError(
                f"{source.file}: tensor {source.name!r}: dtype {source.dtype}; "
                f"expected one of {', '.join(_SAFETENSORS_DTYPE.values())}"
            )
        rows = source if placed.index is None else source.at(placed.index)
        return Piece(rows, placed.key, placed.offset, _SAFETENSORS_DTYPE[placed.dtype])

    @property
    def expert_bytes(self) -> int:
        """Of one expert of one layer."""
        return expert_bytes(self.config, self.dtype)

    @property
    def trunk_bytes(self) -> int:
        """Of everything but routed experts."""
        return trunk_bytes(self.config, self.dtype)

    def kv_block_bytes(self, block_tokens: int) -> int:
        """Of one KV block over all layers."""
        return kv_token_bytes(self.config, self.dtype) * block_tokens
