"""What the engine needs of the model, its KV cache and the exchange; `workers.model` and `workers.exchange` fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..kv.ledger import Ledger
from ..model.batch import Batch


class KV(Protocol):
    """Paged KV of one device. A block's number is its position, any integer from 0; not all positions need be mapped.

    The engine reads ``block_ids`` once, when it is made, and with them what the ledger says of these blocks. Later
    blocks come and go by `Engine.take_in`, `Engine.resize` and `Engine.give_up`.
    """

    @property
    def block_tokens(self) -> int: ...

    @property
    def block_ids(self) -> Sequence[int]:
        """Blocks that are mapped now."""
        ...

    @property
    def ledger(self) -> Ledger | None:
        """Where to note what the blocks hold; None: nowhere."""
        ...

    @property
    def cache(self) -> Any:
        """What `Decoder.forward` gets, for as long as the engine lives."""
        ...

    def page_of(self, block: int) -> int:
        """The first page of a mapped block, whose ledger record is the block's."""
        ...


class Decoder(Protocol):
    """A model that runs one batch; all members of a generation call it equally often, some with no tokens."""

    def forward(self, batch: Batch, kv: Any) -> Tensor:
        """Logits, float32 ``(R, V)``, of the batch's R sampled positions; ``kv`` is `KV.cache`."""
        ...


class StepExchange(Protocol):
    """The part of `Exchange` with which engines agree on steps."""

    def all_gather(self, row: Sequence[int]) -> list[list[int]]: ...

    def doorbell(self) -> int: ...

    def wait(self, seen: int, timeout_s: float) -> None: ...

    def ring(self) -> None: ...

    def check(self) -> None: ...
