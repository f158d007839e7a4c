"""The ledger as the block manager sees it: by block, and perhaps not there at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..kv.ledger import BlockRecord, Ledger


class Notes:
    """Writes down what blocks hold, as soon as it is there and never earlier.

    Parameters
    ----------
    ledger : Ledger or None
        None: nothing is noted, and nothing is known of any block.
    page_of : callable
        First page of a block.
    """

    def __init__(self, ledger: Ledger | None = None, page_of: Callable[[int], int] = lambda block: block) -> None:
        self._ledger = ledger
        self._page_of = page_of

    def read(self, block: int) -> BlockRecord | None:
        return None if self._ledger is None else self._ledger.read(self._page_of(block))

    def clear(self, block: int) -> None:
        if self._ledger is not None:
            self._ledger.clear(self._page_of(block))

    def begin(self, block: int, record: BlockRecord) -> None:
        if self._ledger is not None:
            self._ledger.begin(self._page_of(block), record)

    def append(self, block: int, at: int, tokens: Sequence[int]) -> None:
        if self._ledger is not None:
            self._ledger.append(self._page_of(block), at, tokens)

    def cut(self, block: int, fill: int) -> None:
        if self._ledger is not None:
            self._ledger.cut(self._page_of(block), fill)

    def mark(self, block: int, used: bool, stamp: int) -> None:
        if self._ledger is not None:
            self._ledger.mark(self._page_of(block), used, stamp)

    def detach(self) -> None:
        """Write nothing from here on: another worker may have the pages."""
        self._ledger = None
