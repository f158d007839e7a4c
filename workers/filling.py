"""How extents come to have contents: from a peer's pages where one has them, else from the checkpoint."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from ..errors import ConcertinaError, InternalError
from .loading import Piece, Segments
from .owner import MemoryOwner
from .pages.table import ExtentRequest
from .pages.transfer import CopyPlan, LocalPages, PageReader, PageSource, open_pages, read_table

_log = logging.getLogger(__name__)
LOADING = "loading:"
_MOST_PEERS = 16  # read from at the same time


class _Wanted(NamedTuple):
    """What is to be filled, by its final keys."""

    keys: frozenset[str]
    pieces: Mapping[str, list[Piece]]
    plans: Mapping[PageSource, list[CopyPlan]]


class Filler:
    """Fills the extents of an owner. Calls from several threads wait for each other where they want the same extent.

    An extent is filled under another key and renamed when it is whole, so that an owner killed half-way leaves nothing
    that looks finished.

    Parameters
    ----------
    owner : MemoryOwner
    """

    def __init__(self, owner: MemoryOwner) -> None:
        self._owner = owner
        # A file is written by one at a time: two that copy into it only make each other wait, and spin meanwhile.
        self._writing = threading.Lock()
        self._changed = threading.Condition()  # guards what follows
        self._busy: set[str] = set()
        self._loaded = 0
        self._copied = 0

    @property
    def loaded_bytes(self) -> int:
        """Checkpoint bytes read so far."""
        return self._loaded

    @property
    def copied_bytes(self) -> int:
        """Bytes that came from peers so far, those of copies that failed half-way included."""
        return self._copied

    def fill(self, requests: Sequence[ExtentRequest], pieces: Sequence[Piece], copies: Sequence[CopyPlan] = ()) -> None:
        """Allocate the extents that are missing, and fill them; one that is there is whole.

        Raises
        ------
        OperatorError
            Too few pages are free, or the checkpoint is gone or another one. Nothing of what was missing is there then.
        InternalError
            A peer failed, and no piece says what its extent holds; or the checkpoint cannot be read now.
        """
        with self._alone({request.key for request in requests}):
            there = {extent.key for extent in self._owner.extents()}
            missing = [request for request in requests if request.key not in there]
            if missing:
                self._make(missing, _wanted(frozenset(request.key for request in missing), pieces, copies))

    def drop_unfinished(self) -> None:
        """Give back what an owner that died was filling."""
        self._drop({extent.key for extent in self._owner.extents(LOADING)})

    def _drop(self, keys: Collection[str]) -> None:
        there = [extent.key for extent in self._owner.extents(LOADING) if extent.key in keys]
        if there:
            self._owner.free(*there)

    def _make(self, missing: Sequence[ExtentRequest], wanted: _Wanted) -> None:
        names = {LOADING + key: key for key in wanted.keys}
        self._drop(names)  # left where giving back failed
        # Who copies from a peer does it while that one serves: the change of size waits for nothing else.
        small = {LOADING + plan.key for plans in wanted.plans.values() for plan in plans}
        self._owner.allocate_all([replace(request, key=LOADING + request.key) for request in missing], small)
        try:
            self._write(wanted)
        except BaseException:
            self._owner.free(*names)
            raise
        self._owner.rename_all(names)

    def _write(self, wanted: _Wanted) -> None:
        """Every peer is read by a thread of its own, the checkpoint by this one; then what peers failed to give."""
        planned = {plan.key for plans in wanted.plans.values() for plan in plans}
        with ThreadPoolExecutor(min(_MOST_PEERS, max(1, len(wanted.plans)))) as threads:
            arriving = [threads.submit(self._copy, source, plans) for source, plans in wanted.plans.items()]
            self._load(wanted, wanted.keys - planned)
            failed = planned - {key for peer in arriving for key in peer.result()}
        unknown = failed - wanted.pieces.keys()
        if unknown:
            raise InternalError(f"extents {', '.join(sorted(unknown))}: their peer failed, and no file holds them")
        self._load(wanted, failed)

    def _load(self, wanted: _Wanted, keys: Iterable[str]) -> None:
        pieces = [replace(piece, key=LOADING + key) for key in keys for piece in wanted.pieces.get(key, ())]
        before = 0

        def progress(done: int, _total: int) -> None:
            nonlocal before
            with self._changed:
                self._loaded += done - before
            before = done

        self._owner.load(pieces, progress)

    def _copy(self, source: PageSource, plans: Sequence[CopyPlan]) -> set[str]:
        """Copy extents from one peer; returns which are whole."""
        copied: list[CopyPlan] = []
        trouble: Exception | None = None
        try:
            with open_pages(source) as reader, self._owner.contents([LOADING + plan.key for plan in plans]) as memory:
                for plan in plans:
                    self._copy_extent(reader, plan, memory)
                    copied.append(plan)
        except (ConcertinaError, OSError) as e:
            trouble = e
        whole = _still_there(source, copied)
        if len(whole) < len(plans):
            lacking = len(plans) - len(whole)
            why = trouble or "they were freed meanwhile, or their peer has ended"
            _log.warning("%d of %d extents come from the checkpoint instead: %s", lacking, len(plans), why)
        return whole

    def _copy_extent(self, reader: PageReader, plan: CopyPlan, memory: Segments) -> None:
        key = LOADING + plan.key
        nbytes = len(plan.pages) * reader.geometry.page_bytes
        if nbytes != len(self._owner.extent(key).pages) * self._owner.pool.geometry.page_bytes:
            raise InternalError(f"extent {plan.key!r}: its peer has {nbytes} bytes, which is another size than here")
        if isinstance(reader, LocalPages):
            with self._writing:
                reader.copy_to(plan.pages, self._owner.pool, self._owner.extent(key).pages, self._count_copied)
        else:
            reader.read_into(plan.pages, memory(key, 0, nbytes), self._count_copied)

    def _count_copied(self, nbytes: int) -> None:
        with self._changed:
            self._copied += nbytes

    @contextmanager
    def _alone(self, keys: set[str]) -> Iterator[None]:
        """Keep other calls away from ``keys``."""
        with self._changed:
            self._changed.wait_for(lambda: not keys & self._busy)
            self._busy |= keys
        try:
            yield
        finally:
            with self._changed:
                self._busy -= keys
                self._changed.notify_all()


def _wanted(keys: frozenset[str], pieces: Iterable[Piece], copies: Iterable[CopyPlan]) -> _Wanted:
    by_key: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.key in keys:
            by_key.setdefault(piece.key, []).append(piece)
    by_source: dict[PageSource, list[CopyPlan]] = {}
    planned: set[str] = set()
    for plan in copies:
        if plan.key in keys and plan.key not in planned:
            planned.add(plan.key)
            by_source.setdefault(plan.source, []).append(plan)
    return _Wanted(keys, by_key, by_source)


def _still_there(source: PageSource, copied: Sequence[CopyPlan]) -> set[str]:
    """What has been copied and is still what its peer has at these pages.

    A peer may have been told to free an extent before its copy began, and may have something else there by then.
    """
    if not copied:
        return set()
    try:
        with open_pages(source) as reader:
            theirs = read_table(reader).extents
    except (ConcertinaError, OSError) as e:
        _log.warning("%d extents that were copied may be others' by now: %s", len(copied), e)
        return set()
    return {plan.key for plan in copied if plan.key in theirs and theirs[plan.key].pages == plan.pages}
