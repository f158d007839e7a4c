"""Memory owners and workers as they are called from other processes: plain classes that Ray makes actors of."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .loading import Piece
from .owner import MemoryOwner, OwnerConfig
from .pages.table import ExtentRequest

if TYPE_CHECKING:  # torch takes seconds to import: only a worker's process does so
    from .generation import Assignment
    from .roles import WorkerConfig, WorkerReport

_LOADING = "loading:"


class OwnerService:
    """A memory owner in a process of its own."""

    def __init__(self, config: OwnerConfig) -> None:
        logging.basicConfig(level=logging.INFO)
        self._owner = MemoryOwner(config)
        self._loaded = 0

    def address(self) -> str:
        """Where the pool is handed out."""
        return self._owner.address

    def fill(self, requests: Sequence[ExtentRequest], pieces: Sequence[Piece]) -> None:
        """Allocate the extents that are missing and load them; one that is there is whole.

        An extent is filled under another key and renamed when it is whole, so that an owner killed half-way leaves
        nothing that looks finished.
        """
        there = {extent.key for extent in self._owner.extents()}
        missing = [r for r in requests if r.key not in there]
        self._drop([_LOADING + r.key for r in missing if _LOADING + r.key in there])
        self._owner.allocate_all([ExtentRequest(_LOADING + r.key, r.purpose, r.pages) for r in missing])
        keys = {r.key for r in missing}
        wanted = [Piece(p.source, _LOADING + p.key, p.dest_offset, p.dtype) for p in pieces if p.key in keys]
        before = self._loaded
        self._owner.load(wanted, lambda done, total: self._count(before + done))
        self._owner.rename_all({_LOADING + key: key for key in keys})

    def _count(self, loaded: int) -> None:
        self._loaded = loaded

    def _drop(self, keys: Sequence[str]) -> None:
        if keys:
            self._owner.free(*keys)

    def loaded_bytes(self) -> int:
        """Checkpoint bytes read so far."""
        return self._loaded

    def free(self, keys: Sequence[str]) -> None:
        """Give extents back; raises while somebody maps them."""
        there = {extent.key for extent in self._owner.extents()}
        self._drop([key for key in keys if key in there])

    def pages(self) -> Mapping[str, tuple[int, ...]]:
        """Pages of every finished extent; the page table's own are nobody's business."""
        extents = [e for e in self._owner.extents() if e.purpose != "table"]
        return {e.key: e.pages for e in extents if not e.key.startswith(_LOADING)}

    def usage(self) -> Mapping[str, int]:
        """Pages by purpose."""
        return self._owner.usage()


class WorkerService:
    """A worker in a process of its own."""

    def __init__(self, config: WorkerConfig) -> None:
        logging.basicConfig(level=logging.INFO)
        # Before torch: OpenMP threads that wait shall sleep. GNU's default spins for milliseconds, and on a machine
        # whose cores are shared the one that is waited for then does not get a core (docs/benchmarks.md).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from .worker import Worker

        self._worker = Worker(config)

    def prepare(self, assignment: Assignment) -> None:
        self._worker.prepare(assignment)

    def abandon(self, generation: int) -> None:
        self._worker.abandon(generation)

    def commit(self, generation: int) -> None:
        self._worker.commit(generation)

    def address(self) -> tuple[str, int]:
        return self._worker.address()

    def report(self) -> WorkerReport:
        return self._worker.report()

    def stop(self) -> None:
        self._worker.stop()
