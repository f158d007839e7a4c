"""The ``cpu`` backend: a pool is one sealed memfd, a range is reserved addresses that map it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from collections import Counter
from collections.abc import Sequence

from ...errors import InternalError, OperatorError
from .backend import PoolGeometry, runs
from .holds import Holds, PagesHeld
from .syscalls import MAP_NORESERVE, map_fixed, punch_hole, unmap_fixed

HUGE_BYTES = 2 << 20  # one huge page of x86-64 and of arm64 with 4 KiB base pages
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW  # never SIGBUS under a mapping; geometry is final


class MemfdPool:
    """Pages of one memfd. Closing lets go of the descriptor only: ranges stay valid.

    Parameters
    ----------
    fd : int
        Taken over by the pool, once it exists.

    Raises
    ------
    OperatorError
        The descriptor is not a memfd of this size, sealed against shrinking.
    """

    def __init__(self, fd: int, geometry: PoolGeometry) -> None:
        self.fd = fd
        self.geometry = geometry
        self._check()
        self._finalizer = weakref.finalize(self, os.close, fd)

    def _check(self) -> None:
        name, size = self.geometry.name, os.fstat(self.fd).st_size
        if size != self.geometry.total_bytes:
            raise OperatorError(f"pool {name!r}: expected {self.geometry.total_bytes} bytes, found {size}")
        try:
            seals = fcntl.fcntl(self.fd, fcntl.F_GET_SEALS)
        except OSError as e:
            raise OperatorError(f"pool {name!r}: its descriptor is not a memfd: {e}") from e
        if not seals & fcntl.F_SEAL_SHRINK:
            raise OperatorError(f"pool {name!r}: its memfd is not sealed against shrinking")

    def export(self) -> tuple[int, ...]:
        return (self.fd,)

    def holds(self) -> Holds:
        """A new holder of this pool's pages."""
        return Holds(self.fd, self.geometry.name, self.geometry.page_bytes)

    def check_pages(self, pages: Sequence[int]) -> None:
        """Raise InternalError unless every page number lies in the pool."""
        if pages and not (min(pages) >= 0 and max(pages) < self.geometry.pages):
            raise InternalError(
                f"pool {self.geometry.name!r}: pages {min(pages)}..{max(pages)} outside 0..{self.geometry.pages - 1}"
            )

    def free(self, pages: Sequence[int]) -> None:
        self.check_pages(pages)
        holds = self.holds()
        try:
            if not holds.claim(pages):
                raise PagesHeld(self.geometry.name, (f"some of pages {min(pages)}..{max(pages)}",))
            self.punch(pages)
        finally:
            holds.close()

    def punch(self, pages: Sequence[int]) -> None:
        """Give pages back without asking who maps them; the caller has claimed them."""
        for first, count in runs(pages):
            size = self.geometry.page_bytes
            punch_hole(self.fd, first * size, count * size)

    def resident_bytes(self) -> int:
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        self.fd = -1  # the number may soon be another file's
        self._finalizer()


class _Reservation(mmap.mmap):
    """The mapping object that owns a range's addresses; it unmaps them when it is collected."""


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
        reservation = _Reservation(-1, nbytes, flags=flags)
        # The array exports the reservation's buffer for as long as it lives, so that close() is refused
        # under a live view; a view of the mmap object itself would not prevent it.
        array = (ctypes.c_uint8 * nbytes).from_buffer(reservation)
        start = ctypes.addressof(array)
        unmap_fixed(start, nbytes)
        self._skip = (first_page * page_bytes - start) % HUGE_BYTES
        self._array = array
        self._base = start + self._skip
        self._hold_pages = hold
        self._at: list[tuple[MemfdPool, int] | None] = [None] * positions
        self._holds: dict[MemfdPool, Holds] = {}
        self._held: dict[MemfdPool, Counter[int]] = {}
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
        if nbytes and None in self._at[first:end]:
            raise InternalError(f"range: position {self._at.index(None, first)} is not mapped")

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
        if any(self._at[position : position + len(pages)]):
            raise InternalError(f"range: positions {position}..{position + len(pages) - 1}: already mapped")
        if self._hold_pages:
            self._hold(pool, pages)
        at, size = self._base + position * self.page_bytes, self.page_bytes
        for first, count in runs(pages):
            map_fixed(at, count * size, pool.fd, first * size, writable=writable)
            at += count * size
        self._at[position : position + len(pages)] = [(pool, page) for page in pages]

    def unmap(self, position: int, count: int) -> None:
        self._check_positions(position, count)
        if count:
            unmap_fixed(self._base + position * self.page_bytes, count * self.page_bytes)
        gone = self._at[position : position + count]
        self._at[position : position + count] = [None] * count
        for pool in self._holds.keys() & {entry[0] for entry in gone if entry}:
            self._let_go(pool, [entry[1] for entry in gone if entry and entry[0] is pool])

    def _check_positions(self, position: int, count: int) -> None:
        if position < 0 or position + count > self.positions:
            raise InternalError(f"range: positions {position}..{position + count - 1} outside 0..{self.positions - 1}")

    def _hold(self, pool: MemfdPool, pages: Sequence[int]) -> None:
        if pool not in self._holds:
            self._holds[pool] = pool.holds()
            self._held[pool] = Counter()
        held = self._held[pool]
        self._holds[pool].share([page for page in pages if not held[page]])
        held.update(pages)

    def _let_go(self, pool: MemfdPool, pages: Sequence[int]) -> None:
        held = self._held[pool]
        held.subtract(pages)
        gone = sorted(page for page in set(pages) if not held[page])
        self._holds[pool].release(gone)
        for page in gone:
            del held[page]
        if not held:
            self._holds.pop(pool).close()
            del self._held[pool]


def _close_all(holds: dict[MemfdPool, Holds]) -> None:
    for holder in holds.values():
        holder.close()


class MemfdBackend:
    """Pages in host memory, shared between processes of one host."""

    kind = "cpu"

    def create(self, geometry: PoolGeometry) -> MemfdPool:
        """A pool of empty pages; physical memory is taken when they are first touched."""
        fd = os.memfd_create(geometry.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, geometry.total_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(fd)
            raise
        return MemfdPool(fd, geometry)

    def import_pool(self, descriptors: Sequence[int], geometry: PoolGeometry) -> MemfdPool:
        """See `backend.PageBackend.import_pool`; a memfd pool has one descriptor."""
        if len(descriptors) != 1:
            raise OperatorError(
                f"pool {geometry.name!r}: expected 1 descriptor for a memfd pool, got {len(descriptors)}"
            )
        return MemfdPool(descriptors[0], geometry)

    def reserve(self, positions: int, page_bytes: int, *, first_page: int = 0) -> MemfdRange:
        return MemfdRange(positions, page_bytes, first_page)

    def copy(self, source: MemfdPool, source_pages: Sequence[int], to: MemfdPool, to_pages: Sequence[int]) -> None:
        """See `backend.PageBackend.copy`.

        Raises
        ------
        InternalError
            The lists differ in length, or the pools in page size.
        """
        if len(source_pages) != len(to_pages):
            raise InternalError(f"copy of pages: {len(source_pages)} sources for {len(to_pages)} targets")
        if not source_pages:
            return
        size = source.geometry.page_bytes
        reader, writer = (self.reserve(len(to_pages), size) for _ in range(2))
        reader.map(0, source, source_pages, writable=False)
        writer.map(0, to, to_pages)
        ctypes.memmove(writer.address, reader.address, len(to_pages) * size)


def map_pages(pool: MemfdPool, pages: Sequence[int], *, writable: bool = True) -> MemfdRange:
    """A fresh range that maps ``pages`` of the pool, in order, from position 0."""
    mapped = MemfdRange(len(pages), pool.geometry.page_bytes, pages[0] if pages else 0)
    mapped.map(0, pool, pages, writable=writable)
    return mapped
