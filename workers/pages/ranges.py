"""The ``cpu`` backend's virtual side: reserved addresses that map pages of memfds."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import InternalError
from .backend import runs
from .holds import Holds
from .spans import Span, Spans
from .syscalls import MAP_NORESERVE, map_fixed, populate, unmap_fixed

if TYPE_CHECKING:
    from .memfd import MemfdPool

HUGE_BYTES = 2 << 20  # one huge page of x86-64 and of arm64 with 4 KiB base pages


class _PoolHolds:
    """A range's holds on one pool; a page mapped at two positions is let go with the second."""

    def __init__(self, pool: MemfdPool) -> None:
        self._holds: Holds = pool.holds()
        self._counts: Counter[int] = Counter()

    def add(self, pages: Sequence[int]) -> None:
        self._holds.share([page for page in pages if not self._counts[page]])
        self._counts.update(pages)

    def remove(self, pages: Sequence[int]) -> None:
        self._counts.subtract(pages)
        gone = sorted(page for page in set(pages) if not self._counts[page])
        self._holds.release(gone)
        for page in gone:
            del self._counts[page]

    def close(self) -> None:
        self._holds.close()


class MemfdRange:
    """Reserved addresses that live exactly as long as this object or any view of `buffer`.

    Parameters
    ----------
    positions : int
        Number of page-sized positions.
    page_bytes : int
    first_page : int
        Pool page meant for position 0: addresses and file offsets then agree modulo the huge page size, which
        is what lets the kernel map huge pages.
    hold : bool
        Whether mapped pages are held against freeing; False only for the owner's own window.
    """

    def __init__(self, positions: int, page_bytes: int, first_page: int = 0, *, hold: bool = True) -> None:
        if positions < 1:
            raise InternalError(f"range: positions: expected at least 1, got {positions}")
        self.positions = positions
        self.page_bytes = page_bytes
        nbytes = positions * page_bytes + HUGE_BYTES
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        reservation = mmap.mmap(-1, nbytes, flags=flags)  # unmaps all of the range when it is collected
        # The array exports the reservation's buffer for as long as it lives, so that close() is refused
        # under a live view; a view of the mmap object itself would not prevent it.
        array = (ctypes.c_uint8 * nbytes).from_buffer(reservation)
        start = ctypes.addressof(array)
        unmap_fixed(start, nbytes)
        self._skip = (first_page * page_bytes - start) % HUGE_BYTES
        self._array = array
        self._base = start + self._skip
        self._hold_pages = hold
        self._mapped: Spans[MemfdPool] = Spans()
        self._holds: dict[MemfdPool, _PoolHolds] = {}
        weakref.finalize(reservation, _close_all, self._holds).atexit = False

    @property
    def buffer(self) -> ctypes.Array[ctypes.c_uint8]:
        """What views keep alive; position 0 begins at byte `buffer_offset`."""
        return self._array

    @property
    def buffer_offset(self) -> int:
        return self._skip

    @property
    def nbytes(self) -> int:
        return self.positions * self.page_bytes

    @property
    def address(self) -> int:
        """Address of position 0."""
        return self._base

    def memory(self, offset: int = 0, nbytes: int | None = None) -> memoryview:
        """Bytes of the range; every position they touch must be mapped.

        Raises
        ------
        InternalError
            Outside the range, or a position is unmapped (touching it would end the process).
        """
        nbytes = self.nbytes - offset if nbytes is None else nbytes
        self.check_mapped(offset, nbytes)
        start = self._skip + offset
        return memoryview(self._array).cast("B")[start : start + nbytes]

    def check_mapped(self, offset: int, nbytes: int) -> None:
        """Raise InternalError unless these bytes lie inside the range and are mapped."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise InternalError(f"range: bytes {offset}..{offset + nbytes} outside its {self.nbytes} bytes")
        first, end = offset // self.page_bytes, -(-(offset + nbytes) // self.page_bytes)
        gap = self._mapped.gap(first, end) if nbytes else None
        if gap is not None:
            raise InternalError(f"range: position {gap} is not mapped")

    def map(self, position: int, pool: MemfdPool, pages: Sequence[int], *, writable: bool = True) -> None:
        """See `backend.PageRange.map`.

        Raises
        ------
        InternalError
            Positions or pages out of bounds, positions already mapped, or another page size.
        PagesHeld
            An owner is freeing one of the pages.
        """
        self._check_positions(position, len(pages))
        pool.check_pages(pages)
        if pool.geometry.page_bytes != self.page_bytes:
            raise InternalError(
                f"range: its pages have {self.page_bytes} bytes, those of pool {pool.geometry.name!r} "
                f"{pool.geometry.page_bytes}"
            )
        if self._mapped.any(position, position + len(pages)):
            raise InternalError(f"range: positions {position}..{position + len(pages) - 1}: already mapped")
        if self._hold_pages:
            self._holder(pool).add(pages)
        spans = _spans(position, pool, pages)
        self._mapped.add(spans)
        size = self.page_bytes
        try:
            for span in spans:
                at = self._base + span.position * size
                map_fixed(at, span.count * size, pool.fd, span.page * size, writable=writable)
        except Exception:
            self.unmap(position, len(pages))
            raise

    def clear(self, positions: Sequence[int]) -> None:
        """Write zeros; every position must be mapped."""
        for first, count in runs(positions):
            self.check_mapped(first * self.page_bytes, count * self.page_bytes)
            ctypes.memset(self._base + first * self.page_bytes, 0, count * self.page_bytes)

    def populate(self) -> bool:
        """Spare the first touch of every mapped page its fault; all positions must be mapped. False if refused.

        For pages that have been written: one that has not would become memory.
        """
        return populate(self._base, self.nbytes)

    def unmap(self, position: int, count: int) -> None:
        self._check_positions(position, count)
        if count:
            unmap_fixed(self._base + position * self.page_bytes, count * self.page_bytes)
        gone = self._mapped.remove(position, position + count)
        for pool in self._holds.keys() & {span.pool for span in gone}:
            spans = [span for span in gone if span.pool is pool]
            self._holds[pool].remove([span.page + n for span in spans for n in range(span.count)])

    def _check_positions(self, position: int, count: int) -> None:
        if position < 0 or position + count > self.positions:
            raise InternalError(f"range: positions {position}..{position + count - 1} outside 0..{self.positions - 1}")

    def _holder(self, pool: MemfdPool) -> _PoolHolds:
        if pool not in self._holds:
            self._holds[pool] = _PoolHolds(pool)
        return self._holds[pool]


def _spans(position: int, pool: MemfdPool, pages: Sequence[int]) -> list[Span[MemfdPool]]:
    spans = list[Span["MemfdPool"]]()
    for first, count in runs(pages):
        spans.append(Span(position, count, pool, first))
        position += count
    return spans


def _close_all(holds: dict[MemfdPool, _PoolHolds]) -> None:
    for holder in holds.values():
        holder.close()
