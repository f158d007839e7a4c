"""A device's KV cache as its worker maps it: blocks at fixed positions, which outlive generations, and their ledger."""

from __future__ import annotations

import heapq
import os
import threading
from collections.abc import Collection, Iterable, Sequence

import torch

from ..errors import InternalError
from .generation import LEDGER_KEY, Assignment, kv_key
from .kv.ledger import BlockRecord, Ledger, chain, record_bytes
from .model.kv import KVCache
from .pages.backend import runs
from .pages.memfd import MemfdPool, map_pages
from .pages.ranges import MemfdRange


class DeviceKV:
    """One device's KV blocks and the ledger of its pool, mapped once by the device's worker.

    Addresses are reserved for as many blocks as the pool could hold; a block's number is its position among them. Its
    pages may be any, so that blocks come and go without moving others. They are mapped whenever somebody likes, since
    nobody touches them until the engine knows them, and unmapped between steps.

    Parameters
    ----------
    assignment : Assignment
        The device's KV extent is mapped as it is now.
    pool : MemfdPool
        The device's.

    Attributes
    ----------
    cache : KVCache
        Over all positions; touching a block that is not mapped ends the process.
    copied_bytes : int
        Copied into blocks of it from other pools, by whoever takes another device's KV over.

    Raises
    ------
    InternalError
        The pool has no ledger, or the device no KV extent.
    """

    def __init__(self, assignment: Assignment, pool: MemfdPool) -> None:
        generation = assignment.generation
        model, dtype, self.block_tokens = generation.model, generation.dtype, generation.block_tokens
        self.device, self.extents, self.pool = assignment.device_name, assignment.device, pool
        page_bytes = pool.geometry.page_bytes
        self.block_pages = -(-KVCache.block_bytes(model, dtype, self.block_tokens) // page_bytes)
        self.block_bytes = self.block_pages * page_bytes
        self.positions = pool.geometry.pages // self.block_pages
        self._range = MemfdRange(self.positions * self.block_pages, page_bytes)
        buffer_u8 = torch.frombuffer(
            self._range.buffer, dtype=torch.uint8, count=self._range.nbytes, offset=self._range.buffer_offset
        )
        self.cache = KVCache(model, dtype, buffer_u8, self.positions, self.block_tokens, self.block_bytes)
        self.ledger = self._map_ledger(self._extent(LEDGER_KEY))
        self._pages: dict[int, tuple[int, ...]] = {}
        self._blocks: dict[int, int] = {}  # by their first pages
        self._free: list[int] = []  # positions that were given up: a heap. Those from `_fresh` on were never taken
        self._fresh = 0
        self._lock = threading.Lock()
        self.copied_bytes = 0
        self.map(self._extent(kv_key(self.device)))

    @property
    def block_ids(self) -> list[int]:
        """Mapped blocks, ascending."""
        with self._lock:
            return sorted(self._pages)

    @property
    def mapped(self) -> int:
        """How many blocks are mapped."""
        return len(self._pages)

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of all mapped blocks, block by block."""
        with self._lock:
            return tuple(page for block in sorted(self._pages) for page in self._pages[block])

    def page_of(self, block: int) -> int:
        """The page whose record in the ledger is the block's: its first one."""
        try:
            return self._pages[block][0]
        except KeyError:  # all was let go
            raise InternalError(f"KV of {self.device}: block {block} is not mapped") from None

    def blocks_at(self, pages: Iterable[int]) -> list[int]:
        """Blocks by the pages that `page_of` gives, without those that are not mapped any more."""
        with self._lock:
            return [self._blocks[page] for page in pages if page in self._blocks]

    @property
    def running(self) -> int:
        """How many sequences run, as the ledger has it."""
        with self._lock:
            firsts = list(self._blocks)
        read = [self.ledger.read(page) for page in firsts if self.ledger.used(page)]
        return self.ends([record for record in read if record is not None])

    def ends(self, records: Collection[BlockRecord]) -> int:
        """How many sequences end in one of these blocks: those that are half-filled, or that no other one continues."""
        continued = {record.prefix for record in records}
        size = self.block_tokens
        return sum(len(r.tokens) < size or chain(r.prefix, r.tokens) not in continued for r in records)

    def memory(self, block: int) -> memoryview:
        """The bytes of a mapped block."""
        with self._lock:
            return self._range.memory(block * self.block_bytes, self.block_bytes)

    def grouped(self, pages: Sequence[int]) -> list[tuple[int, ...]]:
        """A KV extent's pages block by block.

        Raises
        ------
        InternalError
            The pages are not whole blocks.
        """
        if len(pages) % self.block_pages:
            raise InternalError(f"KV of {self.device}: {len(pages)} pages are not whole blocks of {self.block_pages}")
        return [tuple(pages[i : i + self.block_pages]) for i in range(0, len(pages), self.block_pages)]

    def unmapped(self, pages: Sequence[int]) -> list[tuple[int, ...]]:
        """Those blocks of a KV extent, as their pages, that are not mapped here; raises as `grouped` does."""
        groups = self.grouped(pages)
        with self._lock:
            return [group for group in groups if group[0] not in self._blocks]

    def map(self, pages: Sequence[int]) -> list[int]:
        """Map a KV extent's pages as blocks; those that are mapped already are skipped. Returns the new blocks.

        Raises
        ------
        InternalError
            Not whole blocks, or not of this pool.
        PagesHeld
            An owner is freeing one of the pages.
        """
        groups = self.grouped(pages)
        with self._lock:
            groups = [group for group in groups if group[0] not in self._blocks]
            blocks = self._take(len(groups))
            done = 0
            try:
                for first, count in runs(blocks):
                    flat = [page for group in groups[done : done + count] for page in group]
                    self._range.map(first * self.block_pages, self.pool, flat)
                    new = dict(zip(range(first, first + count), groups[done : done + count], strict=True))
                    self._pages.update(new)
                    self._blocks.update((own[0], block) for block, own in new.items())
                    done += count
            except Exception:
                self._unmap(blocks[:done])
                for block in blocks[done:]:
                    heapq.heappush(self._free, block)
                raise
        return blocks

    def unmap(self, blocks: Sequence[int]) -> None:
        """Let blocks go; nobody may touch them any more."""
        with self._lock:
            self._unmap(blocks)

    def close(self) -> None:
        """Let everything go, for good."""
        with self._lock:
            self._unmap(list(self._pages))
            self._free.clear()
            self._fresh = self.positions

    def check(self, assignment: Assignment, pool: MemfdPool) -> None:
        """Raise InternalError unless a generation's KV is this: same device, pool and blocks."""
        generation = assignment.generation
        if assignment.device_name != self.device:
            raise InternalError(f"this worker has the KV of {self.device}; it cannot take {assignment.device_name} too")
        if not os.path.sameopenfile(pool.fd, self.pool.fd):
            raise InternalError(f"pool {assignment.device.name!r} is not the one in which this worker has its KV")
        needed = KVCache.block_bytes(generation.model, generation.dtype, generation.block_tokens)
        if (generation.block_tokens, -(-needed // generation.page_bytes)) != (self.block_tokens, self.block_pages):
            raise InternalError(f"generation {generation.id}: its KV blocks differ from those of {self.device}")

    def shares_pool(self, address: str) -> bool:
        """Whether the pool that is handed out at ``address`` is this one."""
        return address == self.extents.address

    def _extent(self, key: str) -> tuple[int, ...]:
        try:
            return self.extents.pages[key]
        except KeyError:
            raise InternalError(f"pool {self.extents.name!r}: no extent {key!r}") from None

    def _map_ledger(self, pages: tuple[int, ...]) -> Ledger:
        self._ledger_range = map_pages(self.pool, pages)
        return Ledger(self._ledger_range.memory(), record_bytes(self.block_tokens), self.block_tokens)

    def _take(self, count: int) -> list[int]:
        """The lowest positions that are free."""
        fresh = max(0, count - len(self._free))
        if self._fresh + fresh > self.positions:
            raise InternalError(f"KV of {self.device}: {count} blocks more than its pool could hold")
        taken = [heapq.heappop(self._free) for _ in range(count - fresh)]
        taken += range(self._fresh, self._fresh + fresh)
        self._fresh += fresh
        return taken

    def _unmap(self, blocks: Sequence[int]) -> None:
        for first, count in runs(sorted(blocks)):
            self._range.unmap(first * self.block_pages, count * self.block_pages)
        for block in blocks:
            del self._blocks[self._pages.pop(block)[0]]
            heapq.heappush(self._free, block)
