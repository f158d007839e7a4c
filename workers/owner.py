"""The memory owner: holds one pool's pages, allocates and fills extents, and hands the pool to workers.

A plain class without Ray or torch: a process that can be started, killed and replaced in milliseconds.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..errors import OperatorError
from .generation import LEDGER_KEY
from .loading import Piece, Progress, Segments, load_pieces
from .owner_roles import OwnerConfig, OwnerStats
from .pages.backend import runs
from .pages.holds import PagesHeld
from .pages.huge import HugePages
from .pages.memfd import MemfdBackend, MemfdPool
from .pages.page_server import PageServer
from .pages.ranges import MemfdRange
from .pages.records import LedgerRecords, ledger_pages
from .pages.reservation import Reservation
from .pages.sharing import PoolServer, fetch_pool
from .pages.store import TABLE_KEY, TableStore, open_pool
from .pages.table import Extent, ExtentRequest, PageTable, Purpose
from .pages.transfer import PageSource

_ADDRESS_CHARACTERS = 107  # of a Unix socket's
# Written once in full when loaded, so taking whole huge pages at once costs nothing. KV is touched as it fills.
_WRITTEN_PURPOSES = ("experts", "trunk")


class MemoryOwner:
    """Owns a new pool; `adopt` makes one that takes over an existing pool. Methods may be called from any thread.

    Parameters
    ----------
    config : OwnerConfig

    Attributes
    ----------
    version : int
        Of the extents; it grows with every change.

    Raises
    ------
    OperatorError
        The geometry is impossible, the token empty, or the address in use (by a living owner).
    """

    def __init__(self, config: OwnerConfig) -> None:
        pool = MemfdBackend().create(config.geometry)
        self._store, self._table = TableStore.format(pool)
        ledger = ledger_pages(config.geometry, config.ledger_record_bytes)
        if ledger:  # before anybody can know the pool: there is none without its ledger
            self._table.allocate(LEDGER_KEY, "table", ledger)
            self._store.write(self._table)
        self._start(config, pool)
        self._find_ledger()
        self._reserve()

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
            Not that pool, damaged, its ledger is of another size, or its old owner still lives.
        InternalError
            Nobody answers at the address.
        """
        owner = cls.__new__(cls)
        pool = fetch_pool(source, config.token) if isinstance(source, str) else open_pool(os.dup(source))
        if pool.geometry != config.geometry:
            pool.close()
            raise OperatorError(f"pool at {source!r}: expected {config.geometry}, found {pool.geometry}")
        owner._start(config, pool)
        try:
            owner._store = TableStore(pool)
            owner._table = owner._store.read()
            owner._find_ledger()
            owner._empty_free_pages()
        except Exception:
            owner.close()
            raise
        owner._reserve()
        return owner

    def _start(self, config: OwnerConfig, pool: MemfdPool) -> None:
        self.config = config
        self.pool = pool
        self.address = config.address or _address(config.name)
        self.version = 0
        self._reserved: Reservation | None = None
        self._lock = threading.Lock()  # one change at a time
        # First of all, because it is exclusive: two living owners of one pool would both give its pages away.
        self._server = PoolServer(pool, config.token, self.address)
        self._window = MemfdRange(config.pages, config.page_bytes, hold=False)
        self._window.map(0, pool, range(config.pages))
        self._huge = HugePages(self._window)
        try:
            self._page_server = PageServer(pool, config.token, config.host)
        except BaseException:
            self._server.close()
            raise

    def _reserve(self) -> None:
        if self.config.reserve:
            self._reserved = Reservation(self.pool, self._huge if self.config.huge_pages else None)

    def _find_ledger(self) -> None:
        ledger = self._table.extents.get(LEDGER_KEY)
        pages = ledger.pages if ledger else ()
        self._records = LedgerRecords(self.pool, pages, self.config.ledger_record_bytes)

    def _keeps_now(self, table: PageTable) -> bool:
        """Whether pages that are free in ``table`` keep their memory."""
        own = (TABLE_KEY, LEDGER_KEY)
        return self.config.reserve or (self.config.keep and any(key not in own for key in table.extents))

    def _empty_free_pages(self) -> None:
        """The old owner may have died between noting pages as free and all that follows from it."""
        for first, count in self._table.free_runs:
            self._records.clear(range(first, first + count))
            if not self._keeps_now(self._table):
                self.pool.free(range(first, first + count))

    def source(self) -> PageSource:
        """Where others read this pool's pages."""
        return PageSource(self.address, self._page_server.host, self._page_server.port, self.config.token)

    def allocate(self, key: str, purpose: Purpose, pages: int) -> Extent:
        """One extent; see `allocate_all`."""
        return self.allocate_all([ExtentRequest(key, purpose, pages)])[0]

    def allocate_all(self, requests: Sequence[ExtentRequest], small: Collection[str] = ()) -> list[Extent]:
        """Allocate all of the extents or none.

        New pages read as zeros, but for KV and weights in a pool that keeps its memory: those have what was there
        before. Extents with a key in ``small`` get no huge pages: it takes seconds to find some for a gigabyte.

        Raises
        ------
        OperatorError
            Too few pages are free.
        InternalError
            A key exists already, a purpose is unknown, or a count below 1.
        """
        with self.pool.holds() as holds:
            with self._lock:
                table = self._table.copy()
                extents = [table.allocate(r.key, r.purpose, r.pages) for r in requests]
                for extent in extents:
                    self._enter(extent.purpose, extent.pages)
                self._commit(table)
                weights = [e.pages for e in extents if self._may_be_huge(e) and e.key not in small]
                for pages in weights:
                    holds.share(pages)
            # The kernel may have to move much memory for a huge page: nobody waits for that who does not want these
            # extents, and they cannot be freed meanwhile.
            self._huge.collapse([run for pages in weights for run in runs(pages)], table.free_runs)
        return extents

    def _may_be_huge(self, extent: Extent) -> bool:
        return self.config.huge_pages and extent.purpose in _WRITTEN_PURPOSES

    def extend(self, key: str, purpose: Purpose, pages: int) -> Extent:
        """Append ``pages`` pages to an extent, or to a new one; see `PageTable.extend` and `allocate_all`."""
        with self._lock:
            table = self._table.copy()
            extent = table.extend(key, purpose, pages)
            self._enter(purpose, extent.pages[-pages:])
            self._commit(table)
        return extent

    def free(self, *keys: str) -> None:
        """Free all of the extents or none, and give their memory back unless the pool keeps it.

        Raises
        ------
        PagesHeld
            Some process still maps an extent; names the extents. Try again when it has let go.
        InternalError
            No such key.
        """
        with self._lock:
            table = self._table.copy()
            self._release(table, {key: table.free(key).pages for key in keys})

    def trim(self, key: str, pages: Sequence[int]) -> Extent:
        """Free some pages of an extent, and give their memory back unless the pool keeps it; returns what is left.

        Raises
        ------
        PagesHeld
            Some process still maps one of them; then nothing is freed.
        InternalError
            No such key, or a page that is not in the extent.
        """
        with self._lock:
            table = self._table.copy()
            left = table.trim(key, pages)
            self._release(table, {key: pages})
        return left

    def _release(self, table: PageTable, gone: Mapping[str, Sequence[int]]) -> None:
        """Make ``table`` the table and give the pages back that are free in it, unless one of them is mapped."""
        with self.pool.holds() as holds:
            held = [key for key, pages in gone.items() if not holds.claim(pages)]
            if held:
                raise PagesHeld(self.pool.geometry.name, tuple(held))
            kv = [page for key, pages in gone.items() if self._table.extent(key).purpose == "kv" for page in pages]
            self._commit(table)
            self._records.clear(kv)  # who still copies them must see that they are KV no more
            if self._keeps_now(table):
                return
            back = table.free_runs if self.config.keep else [run for pages in gone.values() for run in runs(pages)]
            for first, count in back:
                self.pool.punch(range(first, first + count))
            self._huge.forget(back)

    def _enter(self, purpose: Purpose, pages: Sequence[int]) -> None:
        """Before pages become KV their records are emptied, or a reader would take them for some earlier KV.

        Weights are written in full, and nobody reads KV that has not been written; other pages begin as zeros.
        """
        if purpose == "kv":
            self._records.clear(pages)
        elif self.config.keeps and purpose not in _WRITTEN_PURPOSES:
            self._window.clear(pages)

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
            if self._table.extent(key).purpose != extent.purpose:
                self._enter(extent.purpose, extent.pages)
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
            if self._table.extent(key).purpose != purpose:
                self._enter(purpose, pages)
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
            A file cannot be opened, is too short or another one, or a dtype cannot be converted.
        InternalError
            No such extent, a piece outside it, or a file that cannot be read now.
        """
        size = self.pool.geometry.page_bytes
        for piece in pieces:
            piece.check(len(self.extent(piece.key).pages) * size)
        with self.contents({piece.key for piece in pieces}) as segments:
            load_pieces(pieces, segments, progress)

    @contextmanager
    def contents(self, keys: Collection[str]) -> Iterator[Segments]:
        """The memory of extents, to be written; they count as held until this is left.

        Raises
        ------
        InternalError
            No such extent.
        """
        with self.pool.holds() as holds:
            with self._lock:
                extents = {key: self._table.extent(key) for key in keys}
                for extent in extents.values():
                    holds.share(extent.pages)
            yield lambda key, offset, nbytes: self._memory(extents[key].pages, offset, nbytes)

    def close(self) -> None:
        """Stop serving and let go of the pool, which lives on while a worker holds it; no other call may follow."""
        if self._reserved:
            self._reserved.close()
        self._server.close()
        self._page_server.close()
        self.pool.close()
        del self._window, self._huge, self._page_server

    def _commit(self, table: PageTable) -> None:
        """Make a changed copy the table; a table is never changed in place, so readers need no lock."""
        self._store.write(table)
        self._table = table
        self.version += 1

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


def _address(pool: str) -> str:
    address = f"@concertina/{pool}"
    fits = len(address.encode()) <= _ADDRESS_CHARACTERS
    return address if fits else f"@concertina/{hashlib.blake2b(pool.encode(), digest_size=16).hexdigest()}"
