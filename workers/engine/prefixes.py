"""Which block holds the KV of which tokens after which prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..kv.ledger import ROOT, chain

_Key = tuple[bytes, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Match:
    """How far the index knows a sequence.

    ``full`` are the blocks that begin it, ``prefix`` what stands for their tokens. ``tail`` is a block that goes on
    with at least ``tail_tokens`` more of its tokens; there is none where ``tail_tokens`` is 0.
    """

    full: list[int]
    prefix: bytes
    tail: int = -1
    tail_tokens: int = 0

    @property
    def blocks(self) -> list[int]:
        """All of them, in order."""
        return [*self.full, self.tail] if self.tail_tokens else [*self.full]


class PrefixIndex:
    """Findable blocks, full and half-filled, by the prefix before them and their own tokens.

    A prefix is a hash of 16 bytes (`chain`); a block's own tokens are compared themselves.

    Parameters
    ----------
    block_tokens : int
        Tokens of a full block.
    """

    def __init__(self, block_tokens: int) -> None:
        self._size = block_tokens
        self._block_of: dict[_Key, int] = {}
        self._key_of: dict[int, _Key] = {}
        self._after: dict[int, bytes] = {}  # full blocks only

    def __contains__(self, block: int) -> bool:
        return block in self._key_of

    def insert(self, block: int, prefix: bytes, tokens: tuple[int, ...]) -> bytes:
        """Make a block findable unless another one holds the same; the prefix of what follows a full block."""
        key = (prefix, tokens)
        twin = self._block_of.setdefault(key, block)
        if twin == block:
            self._key_of[block] = key
            if len(tokens) == self._size:
                self._after[block] = chain(prefix, tokens)
        return self._after.get(twin, b"")

    def remove(self, block: int) -> None:
        """Forget a block; nothing if it cannot be found."""
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
            self._after.pop(block, None)

    def match(self, tokens: Sequence[int], takeable: Callable[[int], bool]) -> Match:
        """Look a sequence up; at least one token is left to compute.

        Full blocks may be shared. The tail will be written to, so it must be ``takeable``. It may hold the last
        token too, which is then computed again.
        """
        full, prefix, size = [], ROOT, self._size
        for start in range(0, len(tokens) - size, size):
            block = self._block_of.get((prefix, tuple(tokens[start : start + size])))
            if block is None:
                break
            full.append(block)
            prefix = self._after[block]
        rest = tuple(tokens[len(full) * size : (len(full) + 1) * size])
        left = len(tokens) - len(full) * size
        for fill in range(len(rest), 0, -1):
            block = self._block_of.get((prefix, rest[:fill]))
            if block is not None and takeable(block):
                return Match(full, prefix, block, min(fill, left - 1))
        return Match(full, prefix)
