"""KV blocks: who holds which, which may be shared, and which is evicted next. Pure bookkeeping, no tensors.

A block is in exactly one of three places: *used* (some sequence's table names it, or it is reserved), *cached*
(nobody's, but its tokens are known and may be hit again) or *free*. The three always add up to the capacity.

Full blocks are shared. A half-filled one, which the sequence that has it goes on writing, can be found only while
nobody has it, and belongs to who finds it. The ledger, if there is one, knows at any moment of every block at most
what it holds, and of every free block nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ...errors import InternalError
from ..kv.ledger import ROOT, BlockRecord
from .notes import Notes
from .prefixes import PrefixIndex


@dataclass(slots=True)
class _Table:
    """One sequence's blocks and how far their KV is known.

    The first ``full`` blocks are, of which ``hits`` were found; then come the tokens ``tail`` of the next one.
    ``prefix`` stands for the tokens before the tail.
    """

    blocks: list[int]
    hits: int = 0
    full: int = 0
    prefix: bytes = ROOT
    tail: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ShrinkRefused:
    """More blocks are in use than would be left."""

    asked: int
    used: int


class BlockManager:
    """Reference-counted KV blocks with a prefix cache.

    Parameters
    ----------
    blocks : iterable of int
        Blocks there are, by any numbers. Those that ``notes`` know are cached from the start.
    block_tokens : int
        Tokens per block.
    prefix_caching : bool
        Whether computed blocks can be found again by later sequences; if not, nothing is noted either.
    notes : Notes, optional
        The ledger.
    """

    def __init__(
        self, blocks: Iterable[int], block_tokens: int, prefix_caching: bool = True, notes: Notes | None = None
    ) -> None:
        if block_tokens < 1:
            raise InternalError(f"KV blocks of {block_tokens} tokens")
        self.block_tokens = block_tokens
        self._caching = prefix_caching
        self._notes = notes or Notes()
        self._refs: dict[int, int] = {}
        self._free: list[int] = []
        self._idle: dict[int, None] = {}  # cached blocks, least recently used first
        self._kept: dict[int, None] = {}  # other cached blocks, which go after those, the last of them first
        self._reserved: set[int] = set()
        self._unused: frozenset[int] = frozenset()
        self._tables: dict[str, _Table] = {}
        self._index = PrefixIndex(block_tokens)
        self._stamp = 0
        self.adopt([(block, self._notes.read(block)) for block in blocks], noted=True)

    @property
    def capacity(self) -> int:
        return len(self._refs)

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def cached_blocks(self) -> int:
        return len(self._idle) + len(self._kept)

    @property
    def used_blocks(self) -> int:
        return self.capacity - self.available

    @property
    def reserved_blocks(self) -> int:
        return len(self._reserved)

    @property
    def available(self) -> int:
        """Blocks that can be had at once: free ones and evictable ones."""
        return len(self._free) + len(self._idle) + len(self._kept)

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
        match = self._index.match(tokens, self._is_cached)
        hits = match.blocks
        missing = self.blocks_for(len(tokens)) - len(hits)
        if missing + headroom > self.available - sum(map(self._is_cached, hits)):
            return None
        for depth, block in enumerate(hits):
            self._refs[block] += 1
            self._idle.pop(block, None)
            self._kept.pop(block, None)
            self._notes.mark(block, True, depth)
        table = _Table(hits, len(match.full), len(match.full), match.prefix)
        if match.tail_tokens:  # about to be written, hence no longer for others
            start = len(match.full) * self.block_tokens
            table.tail = list(tokens[start : start + match.tail_tokens])
            self._index.remove(match.tail)
            self._notes.cut(match.tail, match.tail_tokens)
        hits.extend(self._take() for _ in range(missing))
        self._tables[key] = table
        return table.full * self.block_tokens + len(table.tail)

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
        """Note that the KV of the first ``computed`` tokens has been written; full blocks become findable."""
        if not self._caching:
            return
        table, size = self._tables[key], self.block_tokens
        known = table.full * size + len(table.tail)
        while known < computed:
            end = min(computed, (table.full + 1) * size)
            self._fill(table, tokens[known:end])
            known = end

    def release(self, key: str, spoiled: bool = False) -> None:
        """Take a sequence's blocks back.

        What was recorded stays findable until it is evicted, the half-filled last block too; if ``spoiled``, only
        what the sequence had found itself, or others have.
        """
        table = self._tables.pop(key)
        if table.tail:
            self._index.insert(table.blocks[table.full], table.prefix, tuple(table.tail))
        for place in reversed(range(len(table.blocks))):  # a prefix outlives what follows it
            block = table.blocks[place]
            self._refs[block] -= 1
            if self._refs[block] < 0:
                raise InternalError(f"KV block {block} released more often than taken")
            if self._refs[block] == 0:
                if spoiled and place >= table.hits:
                    self._index.remove(block)
                self._let_go(block)

    def add(self, blocks: Iterable[int]) -> None:
        """Take in blocks that hold nothing.

        Raises
        ------
        InternalError
            One of them is here already.
        """
        self.adopt([(block, None) for block in blocks])

    def adopt(self, blocks: Collection[tuple[int, BlockRecord | None]], *, noted: bool = False) -> None:
        """Take in blocks, or reserved ones back, and make findable what they hold.

        They count as used more recently than whatever is cached. One that holds what another holds already is free.
        With ``noted`` the ledger has these records, which saves half of the time.

        Raises
        ------
        InternalError
            One of them is here already, and not reserved; nothing has changed then.
        """
        for block, _ in blocks:
            if block in self._refs and block not in self._reserved:
                raise InternalError(f"KV block {block} is here already")
        known = [(block, record) for block, record in blocks if record is not None and self._caching]
        known.sort(key=lambda pair: pair[1].eviction_rank)
        empty = [block for block, record in blocks if record is None or not self._caching]
        for block in empty:
            self._enter(block)
            self._notes.clear(block)
        self._free[:0] = reversed(empty)  # taken from the end, those that were free before first
        for block, record in known:
            self._enter(block)
            self._index.insert(block, record.prefix, record.tokens)
            if not noted and block in self._index:
                self._notes.begin(block, BlockRecord(record.prefix, record.tokens))
            self._let_go(block)

    def reserve(self, count: int) -> list[int]:
        """Up to ``count`` free or cached blocks for the caller to fill, none of those kept; used until `adopt`."""
        blocks = [self._take() for _ in range(min(count, self.unused_besides(())))]
        self._reserved.update(blocks)
        return blocks

    def unused_besides(self, blocks: Iterable[int]) -> int:
        """How many free or cached blocks there are besides these, without those kept."""
        return len(self._free) + len(self._idle) - len(self._idle.keys() & set(blocks))

    def keep(self, blocks: Iterable[int]) -> None:
        """Evict those of these that are cached after all others, the last one first.

        Until one is used, or this is called with others: then those kept before count as used just now.
        """
        self._idle.update(dict.fromkeys(reversed(self._kept)))
        self._kept = {block: None for block in blocks if block in self._idle}
        for block in self._kept:
            del self._idle[block]

    def touch(self, blocks: Iterable[int]) -> None:
        """Those that are cached count as used just now, the last one most recently."""
        for block in blocks:
            if block in self._idle:
                del self._idle[block]
                self._let_go(block)

    def found(self, tokens: Sequence[int]) -> list[int]:
        """Blocks that a sequence would find now, its beginning first."""
        return self._index.match(tokens, self._is_cached).blocks

    def give_up(self, count: int) -> list[int] | ShrinkRefused:
        """Part with blocks: free ones, then cached ones. Refused, and nothing changed, if too many are in use."""
        if count > self.available:
            return ShrinkRefused(self.capacity - count, self.used_blocks)
        blocks = [self._take() for _ in range(count)]
        for block in blocks:
            del self._refs[block]
        return blocks

    def detach(self) -> None:
        """Write nothing to the ledger from here on: who takes what sequences use now goes by that."""
        self._notes.detach()
        self._unused = frozenset([*self._idle, *self._kept])

    def finds_unused(self, tokens: Sequence[int]) -> bool:
        """Whether a sequence would find something here that no sequence used when `detach` was called."""
        match = self._index.match(tokens, self._unused.__contains__)
        return match.tail_tokens > 0 or not self._unused.isdisjoint(match.full)

    def _enter(self, block: int) -> None:
        self._reserved.discard(block)
        self._refs[block] = 0

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            if self._idle:
                block = next(iter(self._idle))
                del self._idle[block]
            else:
                block, _ = self._kept.popitem()
            self._index.remove(block)
            self._notes.clear(block)
        self._refs[block] = 1
        return block

    def _is_cached(self, block: int) -> bool:
        return block in self._idle or block in self._kept

    def _fill(self, table: _Table, tokens: Sequence[int]) -> None:
        block = table.blocks[table.full]
        if table.tail:
            self._notes.append(block, len(table.tail), tokens)
        else:
            self._notes.begin(block, BlockRecord(table.prefix, tuple(tokens), True, table.full))
        table.tail += tokens
        if len(table.tail) == self.block_tokens:
            table.prefix = self._index.insert(block, table.prefix, tuple(table.tail))
            table.tail = []
            table.full += 1

    def _let_go(self, block: int) -> None:
        """Nobody has the block any more: it is cached if it can be found, else free."""
        if block in self._index:
            self._idle[block] = None
            self._stamp += 1
            self._notes.mark(block, False, self._stamp)
        else:
            self._notes.clear(block)
            self._free.append(block)
