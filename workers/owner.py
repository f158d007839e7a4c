"""The memory owner: holds one pool's pages, allocates and fills extents, and hands the pool to workers.

A plain class without Ray or torch: a process that can be started, killed and replaced in milliseconds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import OperatorError
from .loading import Piece, Progress, load_pieces
from .pages.backend import PoolGeometry, runs
from .pages.holds import PagesHeld
from .pages.huge import HugePages
from .pages.memfd import MemfdBackend, MemfdPool
from .pages.ranges import MemfdRange
from .pages.sharing import PoolServer, fetch_pool
from .pages.store import TableStore, open_pool
from .pages.table import Extent, ExtentRequest, PageTable, Purpose

# Written once in full when loaded, so taking whole huge pages at once costs nothing. KV is touched as it fills.
_HUGE_PURPOSES = ("experts", "trunk")


@dataclass(frozen=True, slots=True)
class OwnerConfig:
    """What an owner needs to know.

    Parameters
    ----------
    name : str
        Of the pool, unique on its host.
    pages, page_bytes : int
        Geometry of the pool; its page table takes some of the pages.
    token : str
        Secret that workers must show to get the pool.
    huge_pages : bool
        Try to back weights by huge pages.
    address : str or None
        Unix socket, a path or ``@name``; None gives ``@concertina/<name>``.
    """

    name: str
    pages: int
    page_bytes: int
    token: str = field(repr=False)
    huge_pages: bool = True
    address: str | None = None


@dataclass(frozen=True, slots=True)
class OwnerStats:
    """A pool's accounting: ``pages`` by purpose, adding up to the pool's size."""

    name: str
    address: str
    page_bytes: int
    pages: dict[str, int]
    resident_bytes: int
    huge_regions: int


class MemoryOwner:
    """Owns a new pool; `adopt` makes one that takes over an existing pool. Methods may be called from any thread.

    Parameters
    ----------
    config : OwnerConfig

    Raises
    ------
    OperatorError
        The geometry is impossible, the token empty, or the address in use (by a living owner).
    """

    def __init__(self, config: OwnerConfig) -> None:
        geometry = PoolGeometry(config.name, config.pages, config.page_bytes)
        pool = MemfdBackend().create(geometry)
        self._store, self._table = TableStore.format(pool)
        self._start(config, pool)

    @classmethod
    def adopt(cls, config: OwnerConfig, source: str | int) -> MemoryOwner:
        """Take over the pool of an owner that died, with its table and contents.

        Parameters
        ----------
        config : OwnerConfig
            Name and geometry must be the pool's.
        source : str or int
            Address where any holder serves the pool, or a descriptor of it (duplicated).

        Raises
        ------
        OperatorError
            Not that pool, damaged, or its old owner still lives.
        InternalError
            Nobody answers at the address.
        """
        owner = cls.__new__(cls)
        wanted = PoolGeometry(config.name, config.pages, config.page_bytes)
        pool = fetch_pool(source, config.token) if isinstance(source, str) else open_pool(os.dup(source))
        if pool.geometry != wanted:
            pool.close()
            raise OperatorError(f"pool at {source!r}: expected {wanted}, found {pool.geometry}")
        owner._start(config, pool)
        try:
            owner._store = TableStore(pool)
            owner._table = owner._store.read()
            owner._empty_free_pages()
        except Exception:
            owner.close()
            raise
        return owner

    def _start(self, config: OwnerConfig, pool: MemfdPool) -> None:
        self.pool = pool
        self.address = config.address or f"@concertina/{config.name}"
        self._huge_pages = config.huge_pages
        self._lock = threading.Lock()  # one change at a time
        # First of all, because it is exclusive: two living owners of one pool would both give its pages away.
        self._server = PoolServer(pool, config.token, self.address)
        self._window = MemfdRange(config.pages, config.page_bytes, hold=False)
        self._window.map(0, pool, range(config.pages))
        self._huge = HugePages(self._window)

    def _empty_free_pages(self) -> None:
        """The old owner may have died between noting pages as free and giving their memory back."""
        self.pool.free([page for first, count in self._table.free_runs for page in range(first, first + count)])

    def allocate(self, key: str, purpose: Purpose, pages: int) -> Extent:
        """One extent of zeroed pages; see `allocate_all`."""
        return self.allocate_all([ExtentRequest(key, purpose, pages)])[0]

    def allocate_all(self, requests: Sequence[ExtentRequest]) -> list[Extent]:
        """Allocate all of the extents or none; new pages read as zeros.

        Raises
        ------
        OperatorError
            Too few pages are free.
        InternalError
            A key exists already, a purpose is unknown, or a count below 1.
        """
        with self._lock:
            table = self._table.copy()
            extents = [table.allocate(r.key, r.purpose, r.pages) for r in requests]
            self._commit(table)
            if self._huge_pages:
                wanted = [run for e in extents if e.purpose in _HUGE_PURPOSES for run in runs(e.pages)]
                self._huge.collapse(wanted, table.free_runs)
        return extents

    def free(self, *keys: str) -> None:
        """Free all of the extents or none, and give their memory back.

        Raises
        ------
        PagesHeld
            Some process still maps an extent; names the extents. Try again when it has let go.
        InternalError
            No such key.
        """
        with self._lock:
            table = self._table.copy()
            gone = [table.free(key) for key in keys]
            with self.pool.holds() as holds:
                held = [extent for extent in gone if not holds.claim(extent.pages)]
                if held:
                    raise PagesHeld(self.pool.geometry.name, tuple(extent.key for extent in held))
                self._commit(table)
                for extent in gone:
                    self.pool.punch(extent.pages)
                    self._huge.forget(runs(extent.pages))

    def held(self, *keys: str) -> list[str]:
        """Those of the extents that some process maps now."""
        table = self._table
        with self.pool.holds() as holds:
            return [key for key in keys if holds.held_elsewhere(table.extent(key).pages)]

    def rename(self, key: str, new_key: str, purpose: Purpose | None = None) -> Extent:
        """See `PageTable.rename`; contents stay."""
        with self._lock:
            table = self._table.copy()
            extent = table.rename(key, new_key, purpose)
            self._commit(table)
        return extent

    def rename_all(self, names: Mapping[str, str]) -> None:
        """Rename all of the extents or none, each from a key of ``names`` to its value; purposes stay.

        Raises
        ------
        InternalError
            A key is missing, or a new one exists.
        """
        with self._lock:
            table = self._table.copy()
            for key, new_key in names.items():
                table.rename(key, new_key)
            self._commit(table)

    def move_pages(self, key: str, pages: Sequence[int], to_key: str, purpose: Purpose) -> Extent:
        """See `PageTable.move_pages`; contents stay."""
        with self._lock:
            table = self._table.copy()
            extent = table.move_pages(key, pages, to_key, purpose)
            self._commit(table)
        return extent

    def extent(self, key: str) -> Extent:
        """See `PageTable.extent`."""
        return self._table.extent(key)

    def extents(self, prefix: str = "") -> list[Extent]:
        """Extents whose key begins with ``prefix``, by key."""
        found = self._table.extents
        return [found[key] for key in sorted(found) if key.startswith(prefix)]

    def usage(self) -> dict[str, int]:
        """See `PageTable.usage`."""
        return self._table.usage()

    def stats(self) -> OwnerStats:
        """Accounting of the pool now."""
        return OwnerStats(
            self.pool.geometry.name,
            self.address,
            self.pool.geometry.page_bytes,
            self._table.usage(),
            self.pool.resident_bytes(),
            self._huge.regions,
        )

    def load(self, pieces: Sequence[Piece], progress: Progress | None = None) -> None:
        """Read tensors from their files straight into extents, which count as held meanwhile.

        Every piece is checked before the first byte is read.

        Raises
        ------
        OperatorError
            A file cannot be read or is too short, or a dtype cannot be converted.
        InternalError
            No such extent, or a piece outside it.
        """
        size = self.pool.geometry.page_bytes
        with self.pool.holds() as holds:
            with self._lock:
                extents = {piece.key: self._table.extent(piece.key) for piece in pieces}
                for piece in pieces:
                    piece.check(len(extents[piece.key].pages) * size)
                for extent in extents.values():
                    holds.share(extent.pages)
            load_pieces(pieces, lambda key, at, n: self._memory(extents[key].pages, at, n), progress)

    def close(self) -> None:
        """Stop serving and let go of the pool, which lives on while a worker holds it; no other call may follow."""
        self._server.close()
        self.pool.close()
        del self._window, self._huge

    def _commit(self, table: PageTable) -> None:
        """Make a changed copy the table; a table is never changed in place, so readers need no lock."""
        self._store.write(table)
        self._table = table

    def _memory(self, pages: Sequence[int], offset: int, nbytes: int) -> list[memoryview]:
        """Bytes of an extent as they lie in the owner's window, adjacent pages together."""
        size = self.pool.geometry.page_bytes
        first, end = offset // size, -(-(offset + nbytes) // size)
        skip, found = offset - first * size, []
        for page, count in runs(pages[first:end]):
            length = min(count * size - skip, nbytes)
            found.append(self._window.memory(page * size + skip, length))
            skip, nbytes = 0, nbytes - length
        return found
