"""One record per page of a pool: which tokens' KV the block that begins there holds.

The ledger is shared memory. Whoever writes it may be killed at any moment, and whoever reads it then must never
believe more than what the KV holds. So ``fill`` decides: it is set to 0 before anything else of a record changes, and
raised last. It is four aligned bytes, which are stored at once.

A record, little-endian: fill u32, used u32, stamp u64, prefix 16 bytes, changes u64, 24 reserved, then the tokens, i32
each.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InternalError

PREFIX_BYTES = 16
ROOT = bytes(PREFIX_BYTES)  # the prefix of a sequence's first block

_HEADER_BYTES = 64
_FILL, _USED = 0, 1  # in 4-byte words
_STAMP = 1  # in 8-byte words
_PREFIX = 16  # in bytes
_CHANGES = 4  # in 8-byte words
_TOKENS = _HEADER_BYTES // 4  # in 4-byte words
_STAMP_MASK = (1 << 64) - 1


def record_bytes(block_tokens: int) -> int:
    """Bytes of one record; whole cache lines."""
    return -(-(_HEADER_BYTES + 4 * block_tokens) // 64) * 64


def chain(prefix: bytes, tokens: Sequence[int]) -> bytes:
    """The prefix of the block that follows a full one; it stands for all tokens up to there."""
    return hashlib.blake2b(prefix + _packed(tokens).tobytes(), digest_size=PREFIX_BYTES).digest()


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """What one block holds.

    Parameters
    ----------
    prefix : bytes
        Stands for all tokens before the block, see `chain`.
    tokens : tuple of int
        Those whose KV is written; fewer than a block holds in a sequence's last one.
    used : bool
        Whether a running sequence has it.
    stamp : int
        Of a used block its place in the sequence, else a number that was higher the later it was let go.
    """

    prefix: bytes
    tokens: tuple[int, ...]
    used: bool = False
    stamp: int = 0

    @property
    def eviction_rank(self) -> tuple[bool, int]:
        """Lower ones go first: the longest unused; a sequence's end before its beginning; used ones last."""
        return self.used, -self.stamp if self.used else self.stamp


class Ledger:
    """Records in memory that others may read later.

    Parameters
    ----------
    memory : memoryview
        Contiguous and writable; the record of page p begins at ``p * record_bytes``.
    record_bytes : int
        As of the function of that name, or more; a multiple of 8.
    block_tokens : int

    Raises
    ------
    InternalError
        The records are too small or not aligned, or this machine does not store integers as the format says.
    """

    def __init__(self, memory: memoryview, record_bytes: int, block_tokens: int) -> None:
        if sys.byteorder != "little" or array("i").itemsize != 4:
            raise InternalError("KV ledger: this machine's integers are not little-endian ones of 4 bytes")
        if block_tokens < 1 or record_bytes % 8 or record_bytes < _HEADER_BYTES + 4 * block_tokens:
            raise InternalError(f"KV ledger: records of {record_bytes} bytes for blocks of {block_tokens} tokens")
        self.block_tokens = block_tokens
        self.pages = memory.nbytes // record_bytes
        self._bytes = memory.cast("B")[: self.pages * record_bytes]
        self._words, self._longs, self._ints = self._bytes.cast("I"), self._bytes.cast("Q"), self._bytes.cast("i")
        self._stride = record_bytes

    def clear(self, page: int) -> None:
        """Nothing is known of the page's block from here on."""
        self._lower(page, 0)

    def begin(self, page: int, record: BlockRecord) -> None:
        """Write a whole record anew."""
        start = page * self._stride
        self._lower(page, 0)
        self._bytes[start + _PREFIX : start + _PREFIX + PREFIX_BYTES] = record.prefix
        self.mark(page, record.used, record.stamp)
        self.append(page, 0, record.tokens)

    def append(self, page: int, at: int, tokens: Sequence[int]) -> None:
        """Add tokens behind the first ``at``, whose record stands."""
        word = page * self._stride // 4
        end = at + len(tokens)
        if end > self.block_tokens:
            raise InternalError(f"KV ledger: {end} tokens in a block of {self.block_tokens}")
        first = word + _TOKENS + at
        if end == at + 1:  # a sequence's next token: four times faster than by way of an array
            self._ints[first] = tokens[0]
        else:
            self._ints[first : word + _TOKENS + end] = _packed(tokens)
        self._words[word + _FILL] = end

    def cut(self, page: int, fill: int) -> None:
        """Keep only the first ``fill`` tokens of a record that has at least as many."""
        self._lower(page, fill)

    def mark(self, page: int, used: bool, stamp: int) -> None:
        """Note whether a running sequence has the block, and the `BlockRecord.stamp`."""
        start = page * self._stride
        self._words[start // 4 + _USED] = used
        self._longs[start // 8 + _STAMP] = stamp & _STAMP_MASK

    def read(self, page: int) -> BlockRecord | None:
        """The page's record; None if it says nothing, or nothing that makes sense."""
        if not 0 <= page < self.pages:
            return None
        start = page * self._stride
        fill = self._words[start // 4 + _FILL]
        if not 1 <= fill <= self.block_tokens:
            return None
        first = start // 4 + _TOKENS
        tokens = tuple(self._ints[first : first + fill])
        if min(tokens) < 0:
            return None
        prefix = bytes(self._bytes[start + _PREFIX : start + _PREFIX + PREFIX_BYTES])
        return BlockRecord(prefix, tokens, bool(self._words[start // 4 + _USED]), self._longs[start // 8 + _STAMP])

    def changes(self, page: int) -> int:
        """A number that is another one once the block may hold something else than its record said before."""
        return self._longs[page * self._stride // 8 + _CHANGES]

    def used(self, page: int) -> bool:
        """Whether a running sequence has the page's block, with at least one token in it. Quicker than `read`."""
        word = page * self._stride // 4
        return 0 <= page < self.pages and bool(self._words[word + _FILL] and self._words[word + _USED])

    def _lower(self, page: int, fill: int) -> None:
        start = page * self._stride
        self._words[start // 4 + _FILL] = fill
        at = start // 8 + _CHANGES
        self._longs[at] = (self._longs[at] + 1) & _STAMP_MASK

    def close(self) -> None:
        """Let go of the memory; the ledger must not be used any more."""
        for view in (self._words, self._longs, self._ints, self._bytes):
            view.release()


def _packed(tokens: Sequence[int]) -> array[int]:
    return array("i", tokens)
