"""Mapping a device's KV blocks, and adoption when what is read from fails or is slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from concertina.errors import InternalError
from concertina.workers import adoption
from concertina.workers.device_kv import DeviceKV
from concertina.workers.engine.blocks import BlockManager
from concertina.workers.engine.engine import Engine
from concertina.workers.engine.notes import Notes
from concertina.workers.generation import LEDGER_KEY, kv_key
from concertina.workers.pages.memfd import MemfdBackend
from concertina.workers.pages.sharing import fetch_pool
from concertina.workers.pages.transfer import PageReader, PageSource, open_pages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..model.loaded import Loaded
from .site import BLOCK_TOKENS, TOKEN, LocalWorker, Site, bring, until
from .streams import clients

MakeSite = Callable[..., Site]
Hire = Callable[[], LocalWorker]
BLOCKS = 16


@pytest.fixture(scope="module")
def kept_site(loaded: Loaded) -> Iterator[Site]:
    site = Site(loaded.files, ["a"], blocks=BLOCKS)
    yield site
    site.close()


def open_kv(site: Site) -> DeviceKV:
    (assignment,) = site.generation(["a"], "solo")
    return DeviceKV(assignment, fetch_pool(site.node.address, TOKEN))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, BLOCKS - 1), min_size=1)), max_size=12))
def test_blocks_come_and_go_and_each_keeps_its_pages(kept_site: Site, moves: Sequence[tuple[bool, set[int]]]) -> None:
    """However they are mapped, a block's bytes are its pages', and the owner knows which are held."""
    site = kept_site
    kv = open_kv(site)
    groups = kv.grouped(site.kv("a"))
    there = dict(enumerate(groups))
    kv.memory(kv.block_ids[0])[:2] = b"ab"
    first_page = kv.page_of(kv.block_ids[0])
    for maps, chosen in moves:
        if maps:
            new = kv.map([page for i in sorted(chosen, reverse=True) for page in groups[i]])
            assert len(new) == len(chosen - there.keys())
            there |= {i: groups[i] for i in chosen}
        else:
            gone = [block for block in kv.block_ids if kv.page_of(block) in {groups[i][0] for i in chosen}]
            kv.unmap(gone)
            there = {i: group for i, group in there.items() if i not in chosen}
        assert sorted(kv.pages) == sorted(page for group in there.values() for page in group)
        assert set(kv.grouped(kv.pages)) == set(there.values())
        with site.node.pool.holds() as holds:
            assert [holds.held_elsewhere(group) for group in groups] == [i in there for i in range(BLOCKS)]
        for block in kv.block_ids:
            if kv.page_of(block) == first_page:
                assert bytes(kv.memory(block)[:2]) == b"ab"
    kv.close()
    assert not site.node.held(kv_key("a"))
    assert kv.pages == ()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 3 * BLOCK_TOKENS), max_size=4),
    shared=st.integers(0, BLOCK_TOKENS),
    ended=st.sets(st.integers(0, 3)),
)
def test_how_many_sequences_run_is_known_from_the_ledger(
    kept_site: Site, lengths: Sequence[int], shared: int, ended: set[int]
) -> None:
    """Wherever they end, and where they begin alike."""
    kv = open_kv(kept_site)
    blocks = BlockManager(kv.block_ids, BLOCK_TOKENS, notes=Notes(kv.ledger, kv.page_of))
    for i, length in enumerate(lengths):
        tokens = [*range(shared), *(100 * i + j for j in range(length))]
        assert blocks.allocate(str(i), tokens, headroom=0) is not None
        blocks.record(str(i), tokens, len(tokens))
    assert kv.running == len(lengths)
    for i in ended & set(range(len(lengths))):
        blocks.release(str(i))
    assert kv.running == len(lengths) - len(ended & set(range(len(lengths))))
    for block in kv.block_ids:
        kv.ledger.clear(kv.page_of(block))
    kv.close()


def test_what_is_refused_changes_nothing(make_site: MakeSite) -> None:
    site = make_site("a", blocks=4)
    kv = open_kv(site)
    before = kv.pages
    fresh = [max(before) + 1, 10**6]
    if kv.block_pages > 1:
        with pytest.raises(InternalError, match="not whole blocks"):
            kv.map(fresh[:1])
    with pytest.raises(InternalError, match="outside"):
        kv.map([page for page in fresh for _ in range(kv.block_pages)])
    assert kv.pages == before
    (assignment,) = site.generation(["a"], "solo")
    other = replace(assignment.generation, block_tokens=8)
    with pytest.raises(InternalError, match="its KV blocks differ"):
        kv.check(replace(assignment, generation=other), kv.pool)
    another = MemfdBackend().create(kv.pool.geometry)
    with pytest.raises(InternalError, match="is not the one in which this worker has its KV"):
        kv.check(assignment, another)
    another.close()
    bare = replace(assignment.device, pages={k: v for k, v in assignment.device.pages.items() if k != LEDGER_KEY})
    with pytest.raises(InternalError, match="no extent 'ledger'"):
        DeviceKV(replace(assignment, device=bare), kv.pool)


class FaultyReader:
    """Waits for leave before every read of blocks; fails at the one that it is told to."""

    def __init__(self, inner: PageReader, fails_at: int, leave: threading.Event) -> None:
        self._inner, self._fails_at, self._leave = inner, fails_at, leave
        self.geometry, self.reads = inner.geometry, 0

    def read_into(self, pages: Sequence[int], segments: Sequence[memoryview], copied: object = None) -> None:
        self.reads += 1
        if self.reads > 1:  # the first is of the ledger
            assert self._leave.wait(20)
        if self.reads == self._fails_at:
            raise InternalError("the peer is gone")
        self._inner.read_into(pages, segments)

    def __enter__(self) -> FaultyReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.close()


def waiting_readers(monkeypatch: pytest.MonkeyPatch, leave: threading.Event) -> list[FaultyReader]:
    """Whoever copies waits for leave; the readers, as they are opened."""
    readers: list[FaultyReader] = []

    def opened(source: PageSource, **_: object) -> FaultyReader:
        readers.append(FaultyReader(open_pages(source), 0, leave))
        return readers[-1]

    monkeypatch.setattr(adoption, "open_pages", opened)
    return readers


def test_steps_go_on_beside_a_slow_copy_and_a_failed_one_may_be_repeated(
    make_site: MakeSite, hire: Hire, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, workers = make_site("a", "b", blocks=80, separate=True), [hire(), hire()]
    bring(workers, site.generation(["a", "b"]))
    leave = threading.Event()
    fails_at = [3]
    monkeypatch.setattr(
        adoption, "open_pages", lambda source, **_: FaultyReader(open_pages(source), fails_at[0], leave)
    )
    prompt = list(range(90))
    with clients() as client:
        assert client.start(workers[1], prompt, 8).finished() == "length"
        bring(workers[:1], site.generation(["a"], "solo"), workers[1])
        heir = workers[0].worker
        errors: list[InternalError] = []

        def adopt() -> None:
            try:
                heir.adopt_kv(site.source("b"), 80)
            except InternalError as e:
                errors.append(e)

        copying = threading.Thread(target=adopt)
        copying.start()
        assert client.start(workers[0], [3, 1], 40).finished() == "length"
        assert copying.is_alive()
        leave.set()
        copying.join(20)
        assert [str(e) for e in errors] == ["the peer is gone"]
        report = heir.report()
        assert (report.kv_blocks, report.load.kv_blocks, report.load.kv_blocks_used) == (80, 80, 0)
        fails_at[0] = 0
        heir.adopt_kv(site.source("b"), 80)
        again = client.start(workers[0], prompt, 2)
        assert again.finished() == "length"
        assert again.cached_tokens == len(prompt) - 1 - (len(prompt) - 1) % 4


@pytest.mark.parametrize("batches", [1, 9])
def test_before_a_deadline_what_is_worth_most_is_copied_first(make_site: MakeSite, hire: Hire, batches: int) -> None:
    """Beginnings, without which ends cannot be found; once all is there, they go last all the same."""
    site, workers = make_site("a", "b", blocks=80, separate=True), [hire(), hire()]
    bring(workers, site.generation(["a", "b"]))
    prompt = list(range(90))
    with clients() as client:
        assert client.start(workers[1], prompt, 8).finished() == "length"
        bring(workers[:1], site.generation(["a"], "solo"), workers[1])
        service, kv = workers[0].worker._serving()
        left = iter([True] * batches + [False])
        adoption.adopt(service.engine, kv, site.source("b"), 80, lambda: next(left), lambda: True)
        count = min(batches * adoption._BATCH_BLOCKS, len(prompt) // 4)
        assert cached_beginnings(service.engine, kv) == list(range(0, 4 * count, 4))[::-1]
        again = client.start(workers[0], prompt, 2)
        assert again.finished() == "length"
        assert again.cached_tokens == 4 * count


def test_a_long_sequence_does_not_end_early_what_is_copied_before_a_deadline(make_site: MakeSite, hire: Hire) -> None:
    """So much is left for it that few blocks can be reserved at a time; all that there is room for still comes."""
    site = make_site("a", "b", blocks=50, separate=True)
    workers = [hire(emulated_step_ms=100.0), hire()]
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        assert client.start(workers[1], range(90), 8).finished() == "length"
        bring(workers[:1], site.generation(["a"], "solo"), workers[1])
        stream = client.start(workers[0], [200], 159)
        stream.wait_for(1)
        service, kv = workers[0].worker._serving()
        adoption.adopt(service.engine, kv, site.source("b"), 50, lambda: True, lambda: True)
        assert not stream.end.done()
        assert cached_beginnings(service.engine, kv) == list(range(0, 88, 4))[::-1]


def cached_beginnings(engine: Engine, kv: DeviceKV) -> list[int]:
    """First tokens of the blocks of a prompt that counts upwards, in the order in which they would be evicted."""
    assert kv.ledger is not None
    records = [kv.ledger.read(kv.page_of(block)) for block in engine._core.scheduler.blocks._idle]
    prompts = [r.tokens for r in records if r is not None and r.tokens == tuple(range(r.tokens[0], r.tokens[0] + 4))]
    return [tokens[0] for tokens in prompts]


def test_a_ledger_that_is_missing_or_of_another_size_is_named(make_site: MakeSite, hire: Hire) -> None:
    site, workers = make_site("a", "b", separate=True), [hire(), hire()]
    bring(workers, site.generation(["a", "b"]))
    bring(workers[:1], site.generation(["a"], "solo"), workers[1])
    source = site.source("b")
    bare = replace(source, pool=replace(source.pool, pages={}))
    with pytest.raises(InternalError, match="its ledger is missing or too small"):
        workers[0].worker.adopt_kv(bare, 40)
    with pytest.raises(InternalError, match="serves no generation"):
        hire().worker.adopt_kv(source, 40)
    with pytest.raises(InternalError, match="serves no generation"):
        hire().worker.resize_kv(10, ())
    assert len(workers[0].worker.kv_pages()) == 40 * site.block_pages


class FreedMeanwhile:
    """After so many reads of blocks, their owner frees them, and something else takes the pages."""

    def __init__(self, inner: PageReader, site: Site, left: int) -> None:
        self._inner, self._site, self._left = inner, site, left
        self.geometry = inner.geometry

    def read_into(self, pages: Sequence[int], segments: Sequence[memoryview], copied: object = None) -> None:
        owner = self._site.owners["b"]
        if not set(pages) & set(owner.extent(LEDGER_KEY).pages):
            self._left -= 1
            if self._left == 0:
                count = len(self._site.kv("b"))
                owner.free(kv_key("b"))
                owner.allocate("expert/9/9", "experts", count)
        self._inner.read_into(pages, segments)

    def __enter__(self) -> FreedMeanwhile:
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.close()


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("left", [1, 2])
def test_kv_that_is_freed_while_it_is_copied_is_not_believed(
    make_site: MakeSite, hire: Hire, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, left: int, far: bool
) -> None:
    site, workers = make_site("a", "b", blocks=80, separate=True), [hire(), hire()]
    bring(workers, site.generation(["a", "b"]))
    monkeypatch.setattr(adoption, "open_pages", lambda source, **_: FreedMeanwhile(open_pages(source), site, left))
    prompt = list(range(90))
    with clients() as client:
        assert client.start(workers[1], prompt, 8).finished() == "length"
        bring(workers[:1], site.generation(["a"], "solo"), workers[1])
        source = site.source("b", far=far)
        workers[1].worker.release("a")
        workers[0].worker.adopt_kv(source, 80)
        again = client.start(workers[0], prompt, 4)
        assert again.finished() == "length"
        assert again.tokens == loaded.greedy(prompt, 4)
        assert again.cached_tokens == 0  # its beginning comes last
        load = workers[0].worker.report().load
        assert (load.kv_blocks, load.kv_blocks_used) == (80, 0)


def test_a_copy_under_way_takes_a_later_limit(make_site: MakeSite, hire: Hire, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notice that a node goes may come while nobody had a deadline."""
    site, workers = make_site("a", "b", blocks=80, separate=True), [hire(), hire()]
    bring(workers, site.generation(["a", "b"]))
    leave = threading.Event()
    readers = waiting_readers(monkeypatch, leave)
    with clients() as client:
        assert client.start(workers[1], list(range(90)), 8).finished() == "length"
        bring([workers[0]], site.generation(["a"]), workers[1])
        heir, source = workers[0].worker, site.source("b")
        heir.limit_kv(source, 0.0)  # nothing to limit yet
        limit, limits = heir.limit_kv, list[float | None]()
        monkeypatch.setattr(heir, "limit_kv", lambda source, limit_s: (limit(source, limit_s), limits.append(limit_s)))
        calls = [threading.Thread(target=lambda: heir.adopt_kv(source, 80)) for _ in range(2)]
        for call in calls:  # the second one is of a controller that knows nothing of the first
            call.start()
        while not readers or readers[0].reads < 2 or len(limits) < 2:
            time.sleep(0.001)
        heir.limit_kv(source, 0.0)
        leave.set()
        for call in calls:
            call.join(20)
            assert not call.is_alive()
        assert [reader.reads for reader in readers] == [3, 1]  # the ledger, one batch and its records anew; the ledger


def test_copying_ends_with_its_time_and_with_the_engine(
    make_site: MakeSite, hire: Hire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who recovers from what stopped the engine waits for that."""
    site, workers = make_site("a", "b", "c", blocks=80, separate=True), [hire(), hire(), hire()]
    bring(workers, site.generation(["a", "b", "c"]))
    leave = threading.Event()
    readers = waiting_readers(monkeypatch, leave)
    with clients() as client:
        assert client.start(workers[1], list(range(90)), 8).finished() == "length"
        bring([workers[0], workers[2]], site.generation(["a", "c"]), workers[1])
        heir = workers[0].worker
        assert len(heir.adopt_kv(site.source("b"), 80, 0.0)) == 80 * site.block_pages
        assert readers[0].reads == 1
        copying = threading.Thread(target=lambda: heir.adopt_kv(site.source("b"), 80))
        copying.start()
        while len(readers) < 2 or readers[1].reads < 2:
            time.sleep(0.001)
        workers[2].worker.stop()
        until(workers[0], lambda report: report.parked)
        leave.set()
        copying.join(20)
        assert not copying.is_alive()
        assert readers[1].reads == 3  # the ledger, one batch, and its records anew
