"""KV blocks: who holds which, which may be shared, and which is evicted next. Pure bookkeeping, no tensors.

A block is in exactly one of three places: *used* (some sequence's table names it), *cached* (nobody's, but its
tokens are known and may be hit again) or *free*. The three always add up to the capacity.

A full block is found again by the pair (identity of the entry before it, its tokens). Identities are never used
twice and a dictionary compares the tokens themselves, so a collision of hashes cannot mix up two prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...errors import InternalError

_ROOT = 0  # the identity "before the first block"
_Link = tuple[int, tuple[int, ...]]


@dataclass(slots=True)
class _Table:
    """One sequence's blocks. The first ``indexed`` of them are findable up to the entry ``last``."""

    blocks: list[int] = field(default_factory=list)
    indexed: int = 0
    last: int = _ROOT


@dataclass(frozen=True, slots=True)
class ShrinkRefused:
    """More blocks are in use than would be left."""

    asked: int
    used: int


class BlockManager:
    """Reference-counted KV blocks with a prefix cache.

    Parameters
    ----------
    capacity : int
        Blocks in the pool; they are numbered from 0.
    block_tokens : int
        Tokens per block.
    prefix_caching : bool
        Whether computed full blocks can be found again by later sequences.
    """

    def __init__(self, capacity: int, block_tokens: int, prefix_caching: bool = True) -> None:
        if capacity < 0 or block_tokens < 1:
            raise InternalError(f"KV pool of {capacity} blocks of {block_tokens} tokens")
        self.block_tokens = block_tokens
        self._caching = prefix_caching
        self._refs = [0] * capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._idle: dict[int, None] = {}  # cached blocks, least recently used first
        self._tables: dict[str, _Table] = {}
        self._block_of: dict[_Link, int] = {}
        self._link_of: dict[int, tuple[int, _Link]] = {}  # block -> (identity, its key in _block_of)
        self._next_identity = _ROOT + 1

    @property
    def capacity(self) -> int:
        return len(self._refs)

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def cached_blocks(self) -> int:
        return len(self._idle)

    @property
    def used_blocks(self) -> int:
        return self.capacity - self.available

    @property
    def available(self) -> int:
        """Blocks that can be had at once: free ones and evictable ones."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_tokens)

    def table(self, key: str) -> list[int]:
        """The sequence's blocks in order; the caller must not change the list."""
        return self._tables[key].blocks

    def tables(self) -> dict[str, tuple[int, ...]]:
        """A copy of all tables."""
        return {key: tuple(table.blocks) for key, table in self._tables.items()}

    def allocate(self, key: str, tokens: Sequence[int], headroom: int = 0) -> int | None:
        """Give a new sequence blocks for all its tokens, from the prefix cache as far as that reaches.

        At least one token is left to compute, since its logits are wanted.

        Returns
        -------
        int or None
            Leading tokens whose KV is there already; None (and nothing changed) if fewer than the needed blocks
            plus ``headroom`` are available.
        """
        if key in self._tables:
            raise InternalError(f"sequence {key!r} already has KV blocks")
        hits, last = self._match(tokens)
        idle_hits = sum(self._refs[block] == 0 for block in hits)
        missing = self.blocks_for(len(tokens)) - len(hits)
        if missing + headroom > self.available - idle_hits:
            return None
        for block in hits:
            self._refs[block] += 1
            self._idle.pop(block, None)
        fresh = [self._take() for _ in range(missing)]
        self._tables[key] = _Table(hits + fresh, len(hits), last)
        return len(hits) * self.block_tokens

    def extend(self, key: str, tokens: int) -> bool:
        """Make the sequence's table hold ``tokens`` tokens; False (and nothing changed) if blocks are short."""
        blocks = self._tables[key].blocks
        missing = self.blocks_for(tokens) - len(blocks)
        if missing > self.available:
            return False
        for _ in range(missing):
            blocks.append(self._take())
        return True

    def record(self, key: str, tokens: Sequence[int], computed: int) -> None:
        """Make findable the full blocks among the first ``computed`` tokens, whose KV has been written."""
        table = self._tables[key]
        if not self._caching:
            return
        size = self.block_tokens
        for i in range(table.indexed, computed // size):
            link = (table.last, tuple(tokens[i * size : (i + 1) * size]))
            twin = self._block_of.get(link)
            table.last = self._index(table.blocks[i], link) if twin is None else self._link_of[twin][0]
            table.indexed = i + 1

    def release(self, key: str) -> None:
        """Take a sequence's blocks back; those that were recorded stay findable until they are evicted."""
        for block in reversed(self._tables.pop(key).blocks):  # a prefix outlives what follows it
            self._refs[block] -= 1
            if self._refs[block] < 0:
                raise InternalError(f"KV block {block} released more often than taken")
            if self._refs[block] == 0 and block in self._link_of:
                self._idle[block] = None
            elif self._refs[block] == 0:
                self._free.append(block)

    def grow(self, capacity: int) -> None:
        """Add blocks behind the present ones, up to ``capacity`` in all."""
        if capacity < self.capacity:
            raise InternalError(f"grow to {capacity} KV blocks from {self.capacity}")
        self._free[:0] = range(capacity - 1, self.capacity - 1, -1)
        self._refs.extend([0] * (capacity - self.capacity))

    def shrink(self, capacity: int) -> tuple[tuple[int, int], ...] | ShrinkRefused:
        """Give up the blocks from ``capacity`` on.

        Returns
        -------
        tuple of (source, destination), or ShrinkRefused
            Blocks whose contents the caller must copy before the next step; sources and destinations are
            disjoint. Refused, and nothing changed, if more blocks are in use than would be left.
        """
        if not 0 <= capacity <= self.capacity:
            raise InternalError(f"shrink to {capacity} KV blocks from {self.capacity}")
        if self.used_blocks > capacity:
            return ShrinkRefused(capacity, self.used_blocks)
        self._free = [block for block in self._free if block < capacity]
        for block in [block for block in self._idle if block >= capacity]:
            self._unindex(block)
            del self._idle[block]
        moves = {block: self._take() for block in range(capacity, self.capacity) if self._refs[block]}
        for source, destination in moves.items():
            self._move(source, destination)
        for table in self._tables.values():
            table.blocks[:] = [moves.get(block, block) for block in table.blocks]
        del self._refs[capacity:]
        return tuple(moves.items())

    def _match(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        hits: list[int] = []
        last = _ROOT
        size = self.block_tokens
        for start in range(0, len(tokens) - size, size):
            block = self._block_of.get((last, tuple(tokens[start : start + size])))
            if block is None:
                break
            hits.append(block)
            last = self._link_of[block][0]
        return hits, last

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            self._unindex(block)
        self._refs[block] = 1
        return block

    def _index(self, block: int, link: _Link) -> int:
        identity = self._next_identity
        self._next_identity += 1
        self._block_of[link] = block
        self._link_of[block] = (identity, link)
        return identity

    def _unindex(self, block: int) -> None:
        entry = self._link_of.pop(block, None)
        if entry is not None:
            del self._block_of[entry[1]]

    def _move(self, source: int, destination: int) -> None:
        self._refs[destination] = self._refs[source]
        entry = self._link_of.pop(source, None)
        if entry is not None:
            self._link_of[destination] = entry
            self._block_of[entry[1]] = destination
