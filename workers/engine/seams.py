"""What the engine needs of the model, its KV cache and the exchange; `workers.model` and `workers.exchange` fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..model.batch import Batch


class KV(Protocol):
    """Paged KV of one device."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_tokens(self) -> int: ...


class Decoder(Protocol):
    """A model that runs one batch; all members of a generation call it equally often, some with no tokens."""

    def forward(self, batch: Batch, kv: Any) -> Tensor:
        """Logits, float32 ``(R, V)``, of the batch's R sampled positions."""
        ...


class StepExchange(Protocol):
    """The part of `Exchange` with which engines agree on steps."""

    def all_gather(self, row: Sequence[int]) -> list[list[int]]: ...

    def doorbell(self) -> int: ...

    def wait(self, seen: int, timeout_s: float) -> None: ...

    def ring(self) -> None: ...
