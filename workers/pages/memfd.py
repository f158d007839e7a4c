"""The ``cpu`` backend: a pool is one sealed memfd; `ranges` has the addresses that map it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import InternalError, OperatorError
from .backend import PageBackend, PageRange, PoolGeometry, runs
from .holds import Holds, PagesHeld
from .ranges import MemfdRange
from .syscalls import punch_hole

_NAME_CHARACTERS = 200  # of a name that only people read; the kernel takes 249 bytes
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
        self.geometry = geometry
        self._fd = fd
        self._check()
        self._close = weakref.finalize(self, os.close, fd)

    @property
    def fd(self) -> int:
        """The pool's descriptor; raises InternalError once it is closed, for its number may be another file's."""
        if not self._close.alive:
            raise InternalError(f"pool {self.geometry.name!r}: closed")
        return self._fd

    def _check(self) -> None:
        name, size = self.geometry.name, os.fstat(self._fd).st_size
        if size != self.geometry.total_bytes:
            raise OperatorError(f"pool {name!r}: expected {self.geometry.total_bytes} bytes, found {size}")
        try:
            seals = fcntl.fcntl(self._fd, fcntl.F_GET_SEALS)
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
        if not pages:
            return
        ends = (pages[0], pages[-1]) if isinstance(pages, range) else (min(pages), max(pages))
        if min(ends) < 0 or max(ends) >= self.geometry.pages:
            raise InternalError(
                f"pool {self.geometry.name!r}: pages {min(ends)}..{max(ends)} outside 0..{self.geometry.pages - 1}"
            )

    def free(self, pages: Sequence[int]) -> None:
        self.check_pages(pages)
        with self.holds() as holds:
            if not holds.claim(pages):
                raise PagesHeld(self.geometry.name, (f"some of pages {min(pages)}..{max(pages)}",))
            self.punch(pages)

    def punch(self, pages: Sequence[int]) -> None:
        """Give pages back without asking who maps them; the caller has claimed them."""
        for first, count in runs(pages):
            size = self.geometry.page_bytes
            punch_hole(self.fd, first * size, count * size)

    def resident_bytes(self) -> int:
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        self._close()


class MemfdBackend:
    """Pages in host memory, shared between processes of one host."""

    kind = "cpu"

    def create(self, geometry: PoolGeometry) -> MemfdPool:
        """A pool of empty pages; physical memory is taken when they are first touched."""
        fd = os.memfd_create(geometry.name[:_NAME_CHARACTERS], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
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


if TYPE_CHECKING:  # the type checker proves that this backend keeps to the interface
    _backend: PageBackend[MemfdPool, MemfdRange] = MemfdBackend()
    _range: type[PageRange[MemfdPool]] = MemfdRange
