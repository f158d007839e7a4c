"""What running sequences of a leaver have is there at the boundary, and they go on at once."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
from concertina.errors import InternalError
from concertina.workers import adoption, remapping
from concertina.workers.adoption import Inheritance
from concertina.workers.engine.engine import Engine
from concertina.workers.generation import Assignment, kv_key
from concertina.workers.pages.transfer import LocalPages, PageReader, PageSource, open_pages

from ..model.loaded import Loaded
from .site import BLOCK_TOKENS, LocalWorker, Site, bring, prepare, until
from .streams import Stream, clients

MakeSite = Callable[..., Site]
Hire = Callable[..., LocalWorker]
PROMPTS = [[13 * i + j for j in range(5 + 4 * i)] for i in range(4)]
ROOM = 240  # more than all sequences together need


def right(stream: Stream, loaded: Loaded, before: int) -> bool:
    """Whether a stream that has ended has the true tokens; ``before`` of its prompt's are answers, too."""
    prompt = stream.prompt[: len(stream.prompt) - before]
    answer = [*stream.prompt[len(prompt) :], *stream.tokens]
    return stream.finished() == "length" and answer == loaded.greedy(prompt, len(answer))


def inheriting(site: Site, devices: Sequence[str], rank: int, *left: str, far: bool = False) -> list[Assignment]:
    """The next generation, in which that rank inherits from the devices that left."""
    parts = site.generation(devices)
    parts[rank] = replace(parts[rank], inherits=tuple(site.source(device, far=far) for device in left))
    return parts


@pytest.mark.parametrize("way", ["mapped", "copied", "copied over TCP"])
def test_running_sequences_go_on_at_once_and_nothing_is_computed_again(
    make_site: MakeSite, hire: Hire, loaded: Loaded, way: str
) -> None:
    separate, far = way != "mapped", way == "copied over TCP"
    site = make_site("a", "b", "c", blocks=ROOM, separate=separate)
    workers = [hire(), hire(), hire()]
    bring(workers, site.generation(["a", "b", "c"]))
    gc.disable()
    try:
        with clients() as client:
            streams = [
                [client.start(worker, [i, *prompt], 120) for prompt in PROMPTS[:2]] for i, worker in enumerate(workers)
            ]
            for stream in chain(*streams):
                stream.wait_for(3)
            number = bring(workers[:1], inheriting(site, ["a"], 0, "b", "c", far=far), *workers[1:], heir="a")
            moved = streams[1] + streams[2]
            assert {(s.finished(), s.end.result().moved_to) for s in moved} == {("moved", "a")}
            again = [client.again(workers[0], stream) for stream in moved]
            assert all(right(new, loaded, len(old.tokens)) for new, old in zip(again, moved, strict=True))
            assert [new.cached_tokens for new in again] == [len(new.prompt) - 1 for new in again]
            assert all(right(stream, loaded, 0) for stream in streams[0])
            late = client.start(workers[1], [1, 2, 3], 2)  # from who has not heard yet
            assert (late.finished(), late.end.result().moved_to) == ("moved", "a")
            for device, leaver in (("b", workers[1]), ("c", workers[2])):
                assert leaver.worker.report().retired == number
                pages = workers[0].worker.adopt_kv(site.source(device, far=far), 3 * ROOM)
                assert separate or set(pages) & set(site.kv(device))
                leaver.worker.release("a")
        report = workers[0].worker.report()
        assert report.load.kv_blocks == report.kv_blocks
        assert workers[1].worker.report().device == ""
    finally:
        gc.enable()


def test_nobody_hears_of_the_switch_before_the_heir_has_taken_over(
    make_site: MakeSite, hire: Hire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on the leaver's pages may be freed."""
    site, workers = make_site("a", "b", blocks=ROOM, separate=True), [hire(), hire()]
    before = bring(workers, site.generation(["a", "b"]))
    said: list[int] = []
    take = adoption.Inheritance.take

    def noted(inheritance: adoption.Inheritance, engine: Engine) -> None:
        take(inheritance, engine)
        said.append(workers[0].worker.report().serving)

    monkeypatch.setattr(adoption.Inheritance, "take", noted)
    bring(workers[:1], inheriting(site, ["a"], 0, "b"), workers[1], heir="a")
    assert said == [before]


def test_a_leaver_holds_nothing_once_its_heir_has_what_runs(make_site: MakeSite, hire: Hire) -> None:
    """Else pages that the heir gives up again could not be freed before the leaver is released."""
    site, workers = make_site("a", "b", blocks=ROOM), [hire(), hire()]
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        stream = client.start(workers[1], PROMPTS[3], 120)
        stream.wait_for(8)
        bring(workers[:1], inheriting(site, ["a"], 0, "b"), workers[1], heir="a")
        assert stream.finished() == "moved"
        until(workers[1], lambda report: report.retired)
        assert workers[1].worker.report().kv_blocks == 0
        taken = set(workers[0].worker.kv_pages()) & set(site.kv("b"))
        assert taken
        site.node.trim(kv_key("b"), [page for page in site.kv("b") if page not in taken])
        kept = workers[0].worker.resize_kv(20, ())
        site.node.trim(kv_key("b"), [page for page in site.kv("b") if page not in kept])


def test_who_waits_goes_on_only_once_the_rest_is_handed_over(make_site: MakeSite, hire: Hire, loaded: Loaded) -> None:
    """What it would find is cached, and used by nobody, so that it is not there at the switch."""
    site, workers = make_site("a", "b", blocks=ROOM), [hire(emulated_step_ms=10.0) for _ in range(2)]
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        earlier = [200, *range(9)]
        assert client.start(workers[1], earlier, 3).finished() == "length"
        runs = [client.start(workers[1], [i, *range(9)], 110) for i in range(8)]  # as many as may run
        for stream in runs:
            stream.wait_for(2)
        finds, new = [client.start(workers[1], prompt, 5) for prompt in (earlier, [4, 9, 1])]
        knows = client.start(workers[1], [0, *range(8), 77], 5)  # what a sequence uses that goes, too
        while workers[1].worker.report().load.waiting < 3:
            assert not runs[0].end.done()
            time.sleep(0.001)
        bring(workers[:1], inheriting(site, ["a"], 0, "b"), workers[1], heir="a")
        assert {stream.finished() for stream in [*runs, new, knows]} == {"moved"}
        late = [client.start(workers[1], prompt, 5) for prompt in (earlier, [4, 9, 1])]
        assert late[1].finished() == "moved"
        until(workers[1], lambda report: report.load.waiting == 2)
        assert not finds.end.done()
        workers[1].worker.release("a")
        assert [stream.finished() for stream in (finds, late[0])] == ["moved", "moved"]
        assert right(client.again(workers[0], finds), loaded, 0)


@pytest.mark.parametrize("separate", [False, True])
def test_what_sequences_wait_for_outlives_what_nobody_had(
    make_site: MakeSite, hire: Hire, loaded: Loaded, separate: bool
) -> None:
    """An heir that is full has its own and moved sequences wait, and gets as much again of cached prefixes."""
    site = make_site("a", "b", blocks=160, separate=separate)
    workers = [hire(emulated_step_ms=30.0) for _ in range(2)]
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        for i in range(10):
            assert client.start(workers[1], [200 + i, *range(40)], 1).finished() == "length"
        own = [client.start(workers[0], [i, *range(5)], 45) for i in range(8)]  # as many as may run
        runs = [client.start(workers[1], [100 + i, *range(36)], 60) for i in range(3)]
        for stream in (*own, *runs):
            stream.wait_for(2)
        bring(workers[:1], inheriting(site, ["a"], 0, "b"), workers[1], heir="a")
        assert {stream.finished() for stream in runs} == {"moved"}
        again = [client.again(workers[0], stream) for stream in runs]
        while (load := workers[0].worker.report().load).waiting < len(again):
            assert not own[0].end.done()
            time.sleep(0.001)
        workers[0].worker.adopt_kv(site.source("b"), 160)
        assert workers[0].worker.report().load.kv_blocks == 160
        assert load.running == 8
        workers[1].worker.release("a")
        assert {stream.finished() for stream in own} == {"length"}
        assert all(right(new, loaded, len(old.tokens)) for new, old in zip(again, runs, strict=True))
        assert [new.cached_tokens for new in again] == [len(new.prompt) - 1 for new in again]


@pytest.mark.parametrize("what", ["adopt", "grow", "shrink"])
def test_nobody_stands_still_while_much_is_mapped_or_unmapped(
    make_site: MakeSite, hire: Hire, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Nothing is mapped at a boundary, and not more than a few blocks are unmapped."""
    for name in ("_FEWEST", "_MOST"):
        monkeypatch.setattr(remapping, name, 6)
    site, workers = make_site("a", "b", blocks=ROOM), [hire(), hire()]
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        stream = client.start(workers[0], PROMPTS[0], 140)
        for i in range(4):
            assert client.start(workers[1], [i, *range(40)], 1).finished() == "length"
        bring(workers[:1], site.generation(["a"], "solo"), workers[1])
        service, kv = workers[0].worker._serving()
        changes: list[int] = []  # of blocks that are mapped, at boundaries
        real = service.engine.call

        def call(fn: Callable[[], Any]) -> Any:
            def noted() -> Any:
                before = kv.mapped
                result = fn()
                changes.append(kv.mapped - before)
                return result

            return real(noted)

        monkeypatch.setattr(service.engine, "call", call)
        before = kv.mapped
        if what == "adopt":
            workers[0].worker.adopt_kv(site.source("b"), 2 * ROOM)
            assert kv.mapped >= before + 40
        elif what == "grow":
            workers[0].worker.resize_kv(before + 60, site.kv("b")[: 60 * site.block_pages])
            assert kv.mapped == before + 60
        else:
            workers[0].worker.resize_kv(60, ())
            assert kv.mapped == 60
        assert changes
        assert set(changes) <= set(range(-6, 1))
        assert right(stream, loaded, 0)


def test_a_resize_waits_for_an_adoption(make_site: MakeSite, hire: Hire) -> None:
    """A controller that was killed may have left one; what it maps next must not be given back meanwhile."""
    site, worker = make_site("a", blocks=40), hire().worker
    bring([LocalWorker(worker)], site.generation(["a"], "solo"))
    resizing = threading.Thread(target=worker.resize_kv, args=(20, ()))
    with worker._adopting:
        resizing.start()
        resizing.join(0.2)
        assert worker.report().kv_blocks == 40
    resizing.join(20)
    assert worker.report().kv_blocks == 20


def test_a_sequence_that_has_no_heir_waits_as_before(make_site: MakeSite, hire: Hire) -> None:
    site, workers = make_site("a", "b", blocks=ROOM), [hire(), hire()]
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        stream = client.start(workers[1], PROMPTS[0], 120)
        stream.wait_for(2)
        serving = workers[1].worker.report().serving
        number = bring(workers[:1], site.generation(["a"], "solo"), workers[1])
        report = workers[1].worker.report()
        assert (report.retired, report.serving, report.counted) == (number, 0, serving)
        assert any(map(any, report.counts_LE))
        assert not stream.end.done()
        workers[1].worker.release("a")
        assert stream.finished() == "moved"


def next_boundary(worker: LocalWorker) -> None:
    service = worker.worker._service
    assert service is not None
    service.engine.call(lambda: None)


class Reads:
    """Reads of another device's KV (not of its ledger): their pages; ``before`` is called ahead of each."""

    def __init__(self, site: Site, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pages: list[tuple[int, ...]] = []
        self.before: Callable[[], object] = lambda: None
        theirs, reads = set(site.kv(device)), self

        class Noted(LocalPages):
            def read_into(self, pages: Sequence[int], segments: Sequence[memoryview], copied: Any = None) -> None:
                if theirs.issuperset(pages):
                    reads.before()
                    reads.pages.append(tuple(pages))
                super().read_into(pages, segments, copied)

        def opened(source: PageSource, **_: float) -> PageReader:
            reader = open_pages(source)
            assert isinstance(reader, LocalPages)
            return Noted(reader._pool)

        monkeypatch.setattr(adoption, "open_pages", opened)


def test_full_blocks_are_copied_ahead_and_the_rest_at_the_boundary(
    make_site: MakeSite, hire: Hire, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the heir has computed itself is not copied."""
    site, workers = make_site("a", "b", blocks=ROOM, separate=True), [hire(), hire()]
    reads = Reads(site, "b", monkeypatch)
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        assert client.start(workers[0], range(40), 1).finished() == "length"
        stream = client.start(workers[1], range(41), 110)
        stream.wait_for(6 * BLOCK_TOKENS)
        prepare(workers[:1], parts := inheriting(site, ["a"], 0, "b"))
        (ahead,) = reads.pages
        assert 4 * site.block_pages <= len(ahead) < 17 * site.block_pages  # not the ten of the prompt that both have
        for worker, heir in zip(workers, ("", "a"), strict=True):
            worker.call("commit", parts[0].generation.id, heir)
        assert stream.finished() == "moved"
        again = client.again(workers[0], stream)
        assert right(again, loaded, len(stream.tokens))
        assert again.cached_tokens == len(again.prompt) - 1
        assert [set(pages) & set(ahead) for pages in reads.pages[1:]] == [set()]
        workers[1].worker.release("a")


def test_no_more_is_copied_ahead_than_there_is_room_for(
    make_site: MakeSite, hire: Hire, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what came first, the beginnings of sequences, would make room for what comes later."""
    site, workers = make_site("a", "b", blocks=100, separate=True), [hire(emulated_step_ms=10.0) for _ in range(2)]
    reads = Reads(site, "b", monkeypatch)
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        ours, *theirs = [client.start(workers[min(i, 1)], [i, *range(99)], 30 + 20 * (i == 0)) for i in range(4)]
        for stream in (ours, *theirs):
            stream.wait_for(2)
        load = workers[0].worker.report().load
        parts = inheriting(site, ["a"], 0, "b")
        prepare(workers[:1], parts)
        copied = sum(map(len, reads.pages)) // site.block_pages
        assert 50 <= copied <= load.kv_blocks - load.kv_blocks_used < 3 * 25
        for worker, heir in zip(workers, ("", "a"), strict=True):
            worker.call("commit", parts[0].generation.id, heir)
        assert {stream.finished() for stream in theirs} == {"moved"}
        again = [client.again(workers[0], stream) for stream in theirs]
        assert all(right(new, loaded, len(old.tokens)) for new, old in zip(again, theirs, strict=True))
        assert right(ours, loaded, 0)
        assert sorted(new.cached_tokens for new in again)[1] >= 40, "of two of them most is there"
        workers[1].worker.release("a")


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_deadline_ends_copying_ahead(
    make_site: MakeSite, hire: Hire, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The switch waits for it, and what has come by then is kept."""
    site, workers = make_site("a", "b", blocks=ROOM, separate=True), [hire(emulated_step_ms=10.0) for _ in range(2)]
    reads = Reads(site, "b", monkeypatch)
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        stream = client.start(workers[1], range(100), 55)
        stream.wait_for(2)
        parts = inheriting(site, ["a"], 0, "b")
        (source,) = parts[0].inherits
        if when == "before":
            parts[0] = replace(parts[0], inherits=(replace(source, limit_s=0.0),))
        else:
            reads.before = lambda: workers[0].worker.limit_kv(source, 0.0)
        prepare(workers[:1], parts)
        assert len(reads.pages) == (0 if when == "before" else 1)
        for worker, heir in zip(workers, ("", "a"), strict=True):
            worker.call("commit", parts[0].generation.id, heir)
        assert stream.finished() == "moved"
        again = client.again(workers[0], stream)
        assert right(again, loaded, len(stream.tokens))
        assert again.cached_tokens == len(again.prompt) - 1, "what is left is little enough for the boundary"
        workers[1].worker.release("a")


def test_nobody_waits_long_at_the_boundary_for_a_slow_link(
    make_site: MakeSite, hire: Hire, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, workers = make_site("a", "b", blocks=ROOM, separate=True), [hire(), hire()]
    reads = Reads(site, "b", monkeypatch)
    reads.before = lambda: time.sleep(0.2)
    monkeypatch.setattr(adoption, "_READ_S", 0.3)
    monkeypatch.setattr(adoption, "_REST_BYTES", 1)
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        stream = client.start(workers[1], range(60), 90)
        stream.wait_for(2)
        parts = inheriting(site, ["a"], 0, "b")
        parts[0] = replace(parts[0], inherits=tuple(replace(source, limit_s=0.0) for source in parts[0].inherits))
        bring(workers[:1], parts, workers[1], heir="a")
        assert stream.finished() == "moved"
        assert len(reads.pages) == 2
        again = client.again(workers[0], stream)
        assert right(again, loaded, len(stream.tokens))
        assert again.cached_tokens == 2 * BLOCK_TOKENS, "beginnings come first"
        workers[1].worker.release("a")


def test_what_is_written_anew_while_it_is_copied_ahead_is_not_believed(
    make_site: MakeSite, hire: Hire, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequence ends, and others take its blocks, between the look into the ledger and the copy."""
    site, workers = make_site("a", "b", blocks=40, separate=True), [hire(), hire()]
    reads = Reads(site, "b", monkeypatch)
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        old = client.start(workers[1], range(60), 90)
        old.wait_for(2)

        def overwritten() -> None:
            if not reads.pages:
                assert old.finished() == "length"
                for first in (100, 101):
                    assert client.start(workers[1], [first, *range(110)], 2).finished() == "length"

        reads.before = overwritten
        bring(workers[:1], inheriting(site, ["a"], 0, "b"), workers[1], heir="a")
        assert reads.pages
        again = client.start(workers[0], range(60), 90)
        assert right(again, loaded, 0)
        assert again.cached_tokens == 0
        assert again.tokens == old.tokens


@pytest.mark.parametrize("error", [InternalError("the peer is gone"), OSError("the device is gone")])
def test_without_the_leavers_pages_its_sequences_are_computed_again(
    make_site: MakeSite, hire: Hire, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    site, workers = make_site("a", "b", blocks=ROOM, separate=True), [hire(), hire()]
    reads = Reads(site, "b", monkeypatch)
    bring(workers, site.generation(["a", "b"]))

    def fail() -> None:
        raise error

    reads.before = fail
    with clients() as client:
        streams = [client.start(worker, PROMPTS[3], 120) for worker in workers]
        for stream in streams:
            stream.wait_for(8)
        bring(workers[:1], inheriting(site, ["a"], 0, "b"), workers[1], heir="a")
        assert streams[1].finished() == "moved"
        assert right(client.again(workers[0], streams[1]), loaded, len(streams[1].tokens))
        assert right(streams[0], loaded, 0)
    load = workers[0].worker.report().load
    assert (load.kv_blocks, load.kv_blocks_used) == (ROOM, 0)


def test_a_leaver_whose_memory_gives_no_answer_is_left_without(make_site: MakeSite, hire: Hire, loaded: Loaded) -> None:
    site, workers = make_site("a", "b", blocks=ROOM, separate=True), [hire(), hire()]
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        stream = client.start(workers[1], PROMPTS[2], 120)
        stream.wait_for(8)
        parts = site.generation(["a"])
        source = site.source("b")
        nobody = replace(source, source=replace(source.source, address="@nobody", port=0))
        parts[0] = replace(parts[0], inherits=(nobody,))
        bring(workers[:1], parts, workers[1], heir="a")
        assert stream.finished() == "moved"
        assert right(client.again(workers[0], stream), loaded, len(stream.tokens))


def test_an_abandoned_generation_takes_nothing(
    make_site: MakeSite, hire: Hire, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, workers = make_site("a", "b", blocks=ROOM, separate=True), [hire(), hire()]
    reads = Reads(site, "b", monkeypatch)
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        streams = [client.start(worker, PROMPTS[i], 130) for i, worker in enumerate(workers, 2)]
        for stream in streams:
            stream.wait_for(12)
        number = prepare(workers[:1], inheriting(site, ["a"], 0, "b"))
        workers[1].worker.commit(number, "a")
        for worker in workers:
            worker.worker.abandon(number)
        assert all(right(stream, loaded, 0) for stream in streams)
    assert len(reads.pages) == 1
    assert workers[0].worker.report().prepared == frozenset()


@pytest.mark.parametrize(("separate", "early"), [(False, 0), (True, 0), (False, 2)])
def test_the_heir_lets_running_sequences_come_before_its_next_step(
    make_site: MakeSite, hire: Hire, monkeypatch: pytest.MonkeyPatch, separate: bool, early: int
) -> None:
    """Not where steps are short, nor one that has come before it took anything over. Of those that end in a block that
    was copied ahead it does not know.
    """
    site, workers = make_site("a", "b", blocks=ROOM, separate=separate), [hire(), hire()]
    bring(workers, site.generation(["a", "b"]))
    waits: list[tuple[int, float]] = []

    def noted(engine: Engine, count: int, limit_s: float) -> None:
        waits.append((count - engine.submitted, limit_s))

    step_s = 100.0
    take = Inheritance.take

    def late(inheritance: Inheritance, engine: Engine) -> None:
        engine.submitted += early
        take(inheritance, engine)

    monkeypatch.setattr(Inheritance, "take", late)
    monkeypatch.setattr(Engine, "await_submissions", noted)
    monkeypatch.setattr(Engine, "step_s", property(lambda engine: step_s))
    with clients() as client:
        streams = [client.start(workers[1], [i, *range(9)], 120) for i in range(6)]
        for stream in streams:
            stream.wait_for(2)
        bring(workers[:1], inheriting(site, ["a"], 0, "b"), workers[1], heir="a")
        assert {stream.finished() for stream in streams} == {"moved"}
        next_boundary(workers[0])
        assert len(waits) == 1
        assert (1 if separate else len(streams) - early) <= waits[0][0] <= len(streams) - early
        assert waits[0][1] == 0.1
        step_s = 0.003
        workers[1].worker.release("a")
        bring(workers, site.generation(["a", "b"]))
        bring(workers[:1], inheriting(site, ["a"], 0, "b"), workers[1], heir="a")
        next_boundary(workers[0])
        assert len(waits) == 1
