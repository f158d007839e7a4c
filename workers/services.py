"""Memory owners and workers as they are called from other processes: plain classes that Ray makes actors of."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import InternalError
from .background import in_background
from .filling import LOADING, Filler
from .loading import Piece
from .owner import MemoryOwner
from .owner_roles import OwnerConfig, OwnerReport
from .pages.backend import PageNumbers
from .pages.store import TABLE_KEY
from .pages.table import ExtentRequest, Purpose
from .pages.transfer import CopyPlan, PageSource

if TYPE_CHECKING:  # torch takes seconds to import: only a worker's process does so
    from .generation import Assignment, KVSource
    from .roles import WorkerConfig, WorkerReport


_SWITCH_S = 5e-4
"""How long a thread may keep the interpreter that another one waits for. Python's own 5 ms are longer than a step may
be, and the engine waits for it again and again while another thread prepares a generation."""
_BOUNDARY_S = 0.5


class OwnerService:
    """A memory owner in a process of its own. Calls may be repeated: what was done already is not done again.

    Parameters
    ----------
    config : OwnerConfig
    adopt_from : str or None
        Address at which a holder lends the pool of an owner that died: the pool is taken over with its contents. None
        makes a new pool.

    Raises
    ------
    OperatorError
        The pool offered is another one, or its owner still lives.
    InternalError
        Nobody lends the pool any more.
    """

    def __init__(self, config: OwnerConfig, adopt_from: str | None = None) -> None:
        logging.basicConfig(level=logging.INFO)
        self._owner = MemoryOwner.adopt(config, adopt_from) if adopt_from else MemoryOwner(config)
        self._lock = threading.Lock()  # between looking and changing
        self._filler = Filler(self._owner)
        self._filler.drop_unfinished()

    def address(self) -> str:
        """Where the pool is handed out."""
        return self._owner.address

    def config(self) -> OwnerConfig:
        """What this owner was made with."""
        return self._owner.config

    def source(self) -> PageSource:
        """Where peers read this pool's pages."""
        return self._owner.source()

    def fill(
        self,
        requests: Sequence[ExtentRequest],
        pieces: Sequence[Piece],
        copies: Sequence[CopyPlan] = (),
        seen: int = -1,
    ) -> OwnerReport:
        """See `Filler.fill`; returns what there is then, as `report` does."""
        self._filler.fill(requests, pieces, copies)
        return self.report(seen)

    def report(self, seen: int = -1) -> OwnerReport:
        """What is there now; without the pages if the asker knows this version of them already."""
        version = self._owner.version  # before the pages: they may be newer, never older
        pages = self._pages() if version != seen else None
        return OwnerReport(version, pages, self._filler.loaded_bytes, self._filler.copied_bytes)

    def extend(self, key: str, purpose: Purpose, pages: int, had: int | None = None) -> tuple[int, ...]:
        """Append ``pages`` zeroed pages to an extent or a new one; returns all of its pages.

        ``had`` makes repeating harmless: the pages that the extent had before. Only what it lacks of ``had + pages`` is
        appended then.
        """
        with self._lock:
            there = self._pages_of(key)
            lacking = pages if had is None else had + pages - len(there)
            return PageNumbers(self._owner.extend(key, purpose, lacking).pages) if lacking > 0 else there

    def trim(self, key: str, keep: Sequence[int]) -> tuple[int, ...]:
        """Give back the pages of an extent that are not in ``keep``; returns those left.

        Raises
        ------
        PagesHeld
            Somebody maps one of them; then nothing is given back.
        InternalError
            A page to keep is not in the extent.
        """
        with self._lock:
            there, kept = self._pages_of(key), set(keep)
            if not kept <= set(there):
                lost = len(kept - set(there))
                raise InternalError(f"extent {key!r} of {len(there)} pages: {lost} of those to keep are not in it")
            gone = [page for page in there if page not in kept]
            return PageNumbers(self._owner.trim(key, gone).pages) if gone else there

    def relabel(self, key: str, pages: Sequence[int], to_key: str) -> None:
        """Move pages to another extent of the same purpose; those that are there already stay where they are."""
        with self._lock:
            there = set(self._pages_of(to_key))
            moving = [page for page in pages if page not in there]
            if moving:
                self._owner.move_pages(key, moving, to_key, self._owner.extent(key).purpose)

    def free(self, keys: Sequence[str], seen: int = -1) -> OwnerReport:
        """Give extents back; raises `PagesHeld`, and gives none back, while somebody maps one of them.

        Returns what there is then, as `report` does.
        """
        with self._lock:
            known = [key for key in dict.fromkeys(keys) if self._pages_of(key)]
            if known:
                self._owner.free(*known)
        return self.report(seen)

    def _pages_of(self, key: str) -> tuple[int, ...]:
        found = [extent for extent in self._owner.extents(key) if extent.key == key]
        return PageNumbers(found[0].pages) if found else PageNumbers()

    def _pages(self) -> Mapping[str, tuple[int, ...]]:
        """The page table's own are nobody's business."""
        extents = [e for e in self._owner.extents() if e.key != TABLE_KEY]
        return {e.key: PageNumbers(e.pages) for e in extents if not e.key.startswith(LOADING)}

    def usage(self) -> Mapping[str, int]:
        """Pages by purpose."""
        return self._owner.usage()

    def alive(self) -> int:
        """This process's id."""
        return os.getpid()

    def wait(self, timeout_s: float) -> None:
        """Return after the time-out; a call that fails before says that this process has died."""
        time.sleep(timeout_s)


def _import_worker() -> None:
    """What takes seconds of a new worker's start; those that serve on the same cores shall not feel it."""
    from . import worker  # noqa: F401


class WorkerService:
    """A worker in a process of its own."""

    def __init__(self, config: WorkerConfig) -> None:
        logging.basicConfig(level=logging.INFO)
        # Before torch: OpenMP threads that wait shall sleep. GNU's default spins for milliseconds, and on a machine
        # whose cores are shared the one that is waited for then does not get a core (docs/benchmarks.md).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        sys.setswitchinterval(_SWITCH_S)
        in_background(_import_worker)
        from .worker import Worker

        self._worker = Worker(config)

    def prepare(self, assignment: Assignment) -> WorkerReport:
        self._worker.prepare(assignment)
        return self._worker.report()

    def abandon(self, generation: int) -> WorkerReport:
        self._worker.abandon(generation)
        return self._worker.report()

    def commit(self, generation: int, heir: str = "") -> WorkerReport:
        """Waits for the boundary, too, so that nobody needs to ask again and again; but it may never come."""
        self._worker.commit(generation, heir)
        self._worker.wait_for_boundary(generation, _BOUNDARY_S)
        return self._worker.report()

    def park(self, generation: int) -> WorkerReport:
        """Waits until it stands still, as `commit` does for the boundary."""
        self._worker.park(generation, _BOUNDARY_S)
        return self._worker.report()

    def kv_pages(self) -> tuple[int, ...]:
        return self._worker.kv_pages()

    def resize_kv(self, blocks: int, fresh: Sequence[int]) -> tuple[int, ...]:
        return self._worker.resize_kv(blocks, fresh)

    def adopt_kv(self, source: KVSource, blocks: int, limit_s: float | None) -> tuple[int, ...]:
        return self._worker.adopt_kv(source, blocks, limit_s)

    def limit_kv(self, source: KVSource, limit_s: float | None) -> None:
        self._worker.limit_kv(source, limit_s)

    def release(self, moved_to: str) -> None:
        self._worker.release(moved_to)

    def lend(self, pool: str) -> str | None:
        return self._worker.lend(pool)

    def report(self) -> WorkerReport:
        return self._worker.report()

    def step_ends_s(self, since_s: float) -> list[float]:
        return self._worker.step_ends_s(since_s)

    def watch(self, seen: WorkerReport, timeout_s: float) -> WorkerReport:
        return self._worker.watch(seen, timeout_s)

    def stop(self) -> None:
        self._worker.stop()
