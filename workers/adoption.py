"""Taking over the KV of a device whose worker leaves: its blocks become cached prefixes of this engine."""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import inf
from typing import NamedTuple

from ..errors import ConcertinaError, InternalError
from .background import Throttle
from .device_kv import DeviceKV
from .engine.engine import Engine
from .engine.lockstep import Row
from .generation import AT_SWITCH_BLOCKS, LEDGER_KEY, KVSource
from .kv.ledger import BlockRecord, Ledger, record_bytes
from .pages.transfer import PageReader, open_pages
from .remapping import part_with, take_in, take_in_beside

_log = logging.getLogger(__name__)

# Blocks on their way at a time: these are nobody's meanwhile, and running sequences may need blocks.
_BATCH_BLOCKS = 16
_AHEAD_BATCH_BLOCKS = 64  # more: behind every batch the ledger is read again, and a switch waits for these
_REST_BLOCKS = 64  # so many may be left to copy at the boundary itself, while nobody makes a step
_REST_BYTES = 16 << 20  # of them on their way at a time, so that a slow link is noticed
_READ_S = 2.0  # for a request ahead, or for all at the boundary; who is slower is left without
_KEPT_S = 0.5  # until it is looked anew what waiting sequences would find
_ADOPT_READ_S = 5.0  # for a request afterwards: a deadline, or a recovery, may be waiting

_COMING_S = 0.002  # what sequences need to come to a worker at least
_LONG_STEP_S = 0.4  # a longer step counts as one of this length where others wait for a part of it

_Content = tuple[bytes, tuple[int, ...]]
_Beginning = tuple[str, int]


class _Known(NamedTuple):
    """A block of another device: its pages, and what its ledger says, at that number of `Ledger.changes`."""

    pages: tuple[int, ...]
    record: BlockRecord
    changes: int

    @property
    def version(self) -> tuple[int, _Content]:
        return self.changes, _content(self.record)


def beginning(source: KVSource) -> _Beginning:
    """The pool and the first page: no other device's KV begins there."""
    return source.pool.name, source.pages[0] if source.pages else -1


def adopt(
    engine: Engine,
    kv: DeviceKV,
    source: KVSource,
    blocks: int,
    go_on: Callable[[], bool],
    hurried: Callable[[], bool] = lambda: False,
) -> None:
    """Take over what the ledger says of ``source``, then give up what is free or cached until ``blocks`` are left.

    Pages of the same pool are mapped. Others are copied, in this thread, into blocks that nobody uses, as long as
    ``go_on()``. Steps go on meanwhile. What is worth least comes first, so that it is evicted first, unless
    ``hurried()``: then it may not come to the end. What no sequence had takes no more than its part of the room
    (`EngineCore.worth_adopting`), and what sequences wait for here is the last to go.

    Raises
    ------
    InternalError, OperatorError
        The source cannot be read; what had been copied until then stays.
    """
    try:
        if kv.shares_pool(source.pool.address):
            _map_rest(engine, kv, source, blocks)
        else:
            with _open(kv, source, _ADOPT_READ_S) as reader:
                _copy(engine, kv, source, reader, blocks, go_on, hurried)
        engine.keep_awaited()
        part_with(engine, kv, blocks, engine.give_up)
    finally:
        engine.keep_no_more()


def await_sequences(engine: Engine, due: int, rows: Sequence[Row], part: float) -> None:
    """At a boundary, in the engine's thread: let sequences come whose KV this worker has just taken over.

    Who comes just too late waits for a whole step. It takes them some milliseconds, by way of their clients' router.
    Where no member has made one, nobody is held up in the middle of an answer but those that have come.

    Parameters
    ----------
    engine : Engine
    due : int
        Of `Engine.submitted`, once all have come.
    rows : sequence of Row
        Everyone's words at this boundary.
    part : float
        Of a step: so long everybody may wait.
    """
    step_s = max(row.step_us for row in rows) / 1e6
    limit_s = min(step_s or inf, _LONG_STEP_S) * part
    if limit_s >= _COMING_S:
        engine.await_submissions(due, limit_s)


class Inheritance:
    """KV of devices that leave as a generation comes, for the worker that their sequences go on with.

    What sequences have at that boundary is taken then, so that they may be resubmitted here at once: pages of the same
    pool are mapped, others copied; full blocks ahead, while all goes on, and the rest at the boundary. What no sequence
    has is left to `adopt`. Nothing of this is needed: what is not taken is computed again.

    Parameters
    ----------
    kv : DeviceKV
    sources : sequence of KVSource
    go_on : callable
        Whether a source may be copied from still: not beyond its deadline, or if the generation will not come.

    Attributes
    ----------
    due : int
        Of `Engine.submitted`, once all that was taken has come; 0 before.
    """

    def __init__(self, kv: DeviceKV, sources: Sequence[KVSource], go_on: Callable[[KVSource], bool]) -> None:
        self._kv, self._go_on = kv, go_on
        near = [source for source in sources if kv.shares_pool(source.pool.address)]
        self._near = [(beginning(source), kv.grouped(source.pages)) for source in near]
        self._far = [source for source in sources if not kv.shares_pool(source.pool.address)]
        self._readers: list[tuple[KVSource, PageReader]] = []
        self._found: dict[_Content, int] = {}  # where full blocks lie in this device's pool; they may have gone since
        self._kept: dict[_Beginning, dict[int, BlockRecord]] = {}  # by source: what its sequences will find here
        self.due = 0

    @contextmanager
    def copying_ahead(self, engine: Engine) -> Iterator[None]:
        """Copy full blocks of running sequences meanwhile, in a thread. After an error nothing is taken."""
        thread = threading.Thread(target=self._copy_ahead, args=(engine,), name="copy-ahead", daemon=True)
        if self._far:
            thread.start()
        try:
            yield
        except BaseException:
            self._far.clear()
            raise
        finally:
            if thread.ident is not None:
                thread.join()
            if not self._far:
                self.close()

    def catch_up(self, engine: Engine) -> None:
        """Copy full blocks once more, in this thread, if many have been written since: the switch is near."""
        self._copy_full(engine, _REST_BLOCKS)

    def take(self, engine: Engine) -> None:
        """At the boundary, in the engine's thread: all that running sequences have and that is not here yet."""
        kv = self._kv
        self.due = engine.submitted_before  # those that have come already, faster than this, count as well
        try:
            for begins, groups in self._near:
                used = [group for group in groups if kv.ledger.used(group[0])][:AT_SWITCH_BLOCKS]
                blocks = _blocks(kv, used)
                take_in(engine, kv, blocks)
                self._kept[begins] = kept = {pages[0]: record for pages, record in blocks}
                self.due += kv.ends(kept.values())
            until_s = time.monotonic() + _READ_S
            for source, reader in self._readers:
                if time.monotonic() < until_s:
                    self._take_far(engine, source, reader, until_s)
        except (ConcertinaError, OSError) as e:
            _log.warning("KV of a device that left is not taken over at the switch: %s", e)
        self.close()

    def _take_far(self, engine: Engine, source: KVSource, reader: PageReader, until_s: float) -> None:
        rest = self._missing(source, reader)
        self.due += self._kv.ends([known.record for known in rest])
        rest = rest[max(0, len(rest) - min(2 * _REST_BLOCKS, self._room(engine))) :]
        while rest and time.monotonic() < until_s:
            most = max(1, _REST_BYTES // (len(rest[0].pages) * reader.geometry.page_bytes))
            blocks = engine.reserve(min(len(rest), most))
            if not blocks:
                return
            batch, rest = rest[len(rest) - len(blocks) :], rest[: len(rest) - len(blocks)]
            _fill(engine, self._kv, reader, blocks, batch)
            self._keep(source, blocks, batch)

    def close(self) -> None:
        readers, self._readers = self._readers, []
        self._found.clear()
        self._kept.clear()
        for _, reader in readers:
            reader.close()

    def _copy_ahead(self, engine: Engine) -> None:
        kv = self._kv
        for page, *_ in kv.grouped(kv.pages):
            record = kv.ledger.read(page)
            if record is not None and len(record.tokens) == kv.block_tokens:
                self._found[_content(record)] = page
        for source in self._far:
            try:
                self._readers.append((source, _open(kv, source, _READ_S)))
            except ConcertinaError as e:
                _log.warning("KV of a device that leaves cannot be copied ahead: %s", e)
        self._copy_full(engine, 0)

    def _copy_full(self, engine: Engine, tolerated: int) -> None:
        for source, reader in list(self._readers):
            try:
                self._copy_full_of(engine, source, reader, tolerated)
            except (ConcertinaError, OSError) as e:  # at the boundary it would be too much, or fail again
                _log.warning("KV of a device that leaves is not copied ahead: %s", e)
                self._readers.remove((source, reader))
                reader.close()

    def _copy_full_of(self, engine: Engine, source: KVSource, reader: PageReader, tolerated: int) -> None:
        kv = self._kv
        full = [known for known in self._missing(source, reader) if len(known.record.tokens) == kv.block_tokens]
        room = max(0, self._room(engine) - _BATCH_BLOCKS)  # sequences here grow meanwhile
        full = full[max(0, len(full) - room) :]
        scarce = room - len(full) < 4 * _AHEAD_BATCH_BLOCKS
        most = _BATCH_BLOCKS if scarce else _AHEAD_BATCH_BLOCKS
        rest = Throttle(engine.step_s)
        while len(full) > tolerated and self._go_on(source):
            rest()
            blocks = engine.reserve(min(len(full), most))
            if not blocks:
                break
            at = len(full) - len(blocks)
            batch, full = full[at:], full[:at]  # beginnings first: ends need them
            _fill(engine, kv, reader, blocks, batch, lambda: _read_records(kv, source, reader, running=True))
            self._keep(source, blocks, batch)
        if scarce:  # what goes first then must not be what the rest needs
            kept = self._kept[beginning(source)]
            engine.touch(kv.blocks_at(sorted(kept, key=lambda page: kept[page].eviction_rank)))

    def _keep(self, source: KVSource, blocks: Sequence[int], batch: Sequence[_Known]) -> None:
        records = {self._kv.page_of(block): known.record for block, known in zip(blocks, batch, strict=True)}
        self._kept[beginning(source)].update(records)
        self._found.update((_content(record), page) for page, record in records.items())

    def _room(self, engine: Engine) -> int:
        """Blocks that may be copied before they take the place of some that sequences will find."""
        load, ledger = engine.load, self._kv.ledger
        kept = sum(not ledger.used(page) for pages in self._kept.values() for page in pages)
        return max(0, load.kv_blocks - load.kv_blocks_used - kept)

    def _missing(self, source: KVSource, reader: PageReader) -> list[_Known]:
        """Blocks of running sequences that are not here, the ends of sequences first."""
        missing: list[_Known] = []
        kept = self._kept[beginning(source)] = {}
        for known in _read_records(self._kv, source, reader, running=True):
            page = self._found.get(_content(known.record))
            if page is not None and self._holds(page, known.record):
                kept[page] = known.record
            else:
                missing.append(known)
        return sorted(missing, key=lambda known: known.record.eviction_rank)

    def _holds(self, page: int, record: BlockRecord) -> bool:
        found = self._kv.ledger.read(page)
        return found is not None and _content(found) == _content(record)


def _blocks(kv: DeviceKV, groups: Iterable[tuple[int, ...]]) -> list[tuple[tuple[int, ...], BlockRecord]]:
    """Those that this pool's ledger says something of."""
    read = ((group, kv.ledger.read(group[0])) for group in groups)
    return [(group, record) for group, record in read if record is not None]


def _map_rest(engine: Engine, kv: DeviceKV, source: KVSource, blocks: int) -> None:
    rest, known = Throttle(engine.step_s), list[_Known]()
    for group in kv.unmapped(source.pages):  # its worker writes it no more, and nobody else does yet
        known += [_Known(*block, 0) for block in _blocks(kv, [group])]
        rest()
    taken = [(each.pages, each.record) for each in _worth_taking(engine, known, blocks)]
    take_in_beside(engine, kv, taken, rest)


def _worth_taking(engine: Engine, known: Sequence[_Known], blocks: int) -> list[_Known]:
    """What is to come into a cache of so many blocks, the least useful first."""
    used = sum(each.record.used for each in known)
    count = engine.worth_adopting(used, len(known) - used, blocks)
    return sorted(known, key=lambda each: each.record.eviction_rank)[len(known) - count :]


def _open(kv: DeviceKV, source: KVSource, request_timeout_s: float) -> PageReader:
    reader = open_pages(source.source, request_timeout_s=request_timeout_s)
    if reader.geometry.page_bytes != kv.pool.geometry.page_bytes:
        reader.close()
        raise InternalError(f"KV of {kv.device}: pool {reader.geometry.name!r} has pages of another size")
    return reader


def _copy(
    engine: Engine,
    kv: DeviceKV,
    source: KVSource,
    reader: PageReader,
    most: int,
    go_on: Callable[[], bool],
    hurried: Callable[[], bool],
) -> None:
    missing = _missing(kv, _read_records(kv, source, reader))
    missing = _worth_taking(engine, missing, min(most, engine.load.kv_blocks))
    best: list[int] = []  # blocks that were filled in a hurry, the least useful first
    rest, kept_s = Throttle(engine.step_s), -inf
    while missing and go_on():
        rest()
        if time.monotonic() - kept_s > _KEPT_S:
            engine.keep_awaited()
            kept_s = time.monotonic()
        hurry = hurried()  # then what is worth less comes later, and not in the place of what has come
        room = engine.unused_besides(best) if hurry else len(missing)
        blocks = engine.reserve(min(len(missing), _BATCH_BLOCKS, room))
        if not blocks:
            break
        if hurry:
            missing, batch = missing[: len(missing) - len(blocks)], missing[len(missing) - len(blocks) :]
            best[:0] = blocks
        else:
            batch, missing = missing[: len(blocks)], missing[len(blocks) :]
        part = replace(source, pages=tuple(page for known in batch for page in known.pages))
        _fill(engine, kv, reader, blocks, batch, partial(_read_records, kv, part, reader))
    if best:
        engine.touch(best)  # else what came last would stay longest


def _fill(
    engine: Engine,
    kv: DeviceKV,
    reader: PageReader,
    blocks: Sequence[int],
    batch: Sequence[_Known],
    read_again: Callable[[], Sequence[_Known]] | None = None,
) -> None:
    """Copy a batch into reserved blocks, and have the engine index them.

    ``read_again``: they may be written or freed meanwhile; what the ledger says otherwise afterwards is not taken.
    """
    records: list[BlockRecord | None] = [None] * len(blocks)
    try:
        if batch:
            reader.read_into([page for known in batch for page in known.pages], [kv.memory(b) for b in blocks])
            kv.copied_bytes += len(batch) * kv.block_bytes
        still = None if read_again is None else {known.pages: known.version for known in read_again()}
        records = [k.record if still is None or still.get(k.pages) == k.version else None for k in batch]
    finally:
        engine.give_back(list(zip(blocks, records, strict=True)))


def _missing(kv: DeviceKV, theirs: Sequence[_Known]) -> list[_Known]:
    """What cannot be found on this device.

    A running sequence keeps its half-filled block to itself, so that another one's is wanted even if it is the same.
    """
    ours = (kv.ledger.read(group[0]) for group in kv.grouped(kv.pages))
    found = {_content(r) for r in ours if r is not None and not (r.used and len(r.tokens) < kv.block_tokens)}
    return [known for known in theirs if _content(known.record) not in found]


def _content(record: BlockRecord) -> _Content:
    return record.prefix, record.tokens


def _read_records(kv: DeviceKV, source: KVSource, reader: PageReader, *, running: bool = False) -> list[_Known]:
    """Blocks of the source, by their pages, that its ledger knows; with ``running`` those that sequences have."""
    size, stride = reader.geometry.page_bytes, record_bytes(kv.block_tokens)
    groups = kv.grouped(source.pages)
    ledger_pages = source.pool.pages.get(LEDGER_KEY, ())
    if len(ledger_pages) * size < reader.geometry.pages * stride:
        raise InternalError(f"pool {source.pool.name!r}: its ledger is missing or too small")
    wanted = sorted({at // size for g in groups for at in (g[0] * stride, (g[0] + 1) * stride - 1)})
    memory = memoryview(mmap.mmap(-1, len(ledger_pages) * size))  # only what is read takes memory
    reader.read_into([ledger_pages[i] for i in wanted], [memory[i * size : (i + 1) * size] for i in wanted])
    ledger = Ledger(memory, stride, kv.block_tokens)
    wanted_groups = [g for g in groups if not running or ledger.used(g[0])]
    found = [(g, ledger.read(g[0]), ledger.changes(g[0])) for g in wanted_groups]
    return [_Known(group, record, changes) for group, record, changes in found if record is not None]
