"""A worker's whole life, with real engines over real owners in one process."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from concertina.errors import InternalError, PeerLost
from concertina.workers import mapping
from concertina.workers import worker as worker_module
from concertina.workers.device_kv import DeviceKV
from concertina.workers.generation import TRUNK_KEY, Assignment, expert_key, kv_key
from concertina.workers.owner import MemoryOwner
from concertina.workers.pages.backend import PoolGeometry
from concertina.workers.pages.memfd import MemfdBackend
from concertina.workers.pages.sharing import fetch_pool
from concertina.workers.worker import Worker

from ..model.loaded import Loaded
from .site import PAGE, TOKEN, LocalWorker, Site, bring, prepare, together, until
from .streams import Clients, Stream, clients

MakeSite = Callable[..., Site]
Hire = Callable[[], LocalWorker]
PROMPTS = [[7 * i + j for j in range(5 + 3 * i)] for i in range(4)]


def right(stream: Stream, loaded: Loaded, before: int = 0) -> bool:
    """Whether a stream that has ended has the true tokens; ``before`` of its prompt's are answers, too."""
    prompt = stream.prompt[: len(stream.prompt) - before]
    answer = [*stream.prompt[len(prompt) :], *stream.tokens]
    return stream.finished() == "length" and answer == loaded.greedy(prompt, len(answer))


def start_all(client: Clients, workers: list[LocalWorker], tokens: int) -> list[Stream]:
    streams = [client.start(workers[i % len(workers)], prompt, tokens) for i, prompt in enumerate(PROMPTS)]
    for stream in streams:
        stream.wait_for(2)
    return streams


def wait_free(owner: MemoryOwner, key: str, timeout_s: float = 5.0) -> None:
    """Until nobody maps an extent; without the garbage collector's help."""
    end_s = time.monotonic() + timeout_s
    while owner.held(key):
        assert time.monotonic() < end_s, f"{key} is still mapped"
        time.sleep(0.01)


def test_a_standby_takes_a_role_and_everything_may_be_said_twice(
    make_site: MakeSite, hire: Hire, loaded: Loaded
) -> None:
    site, worker = make_site("a"), hire()
    report = worker.worker.report()
    assert (report.serving, report.prepared, report.device, report.kv_blocks) == (0, frozenset(), "", 0)
    assert report.address is None
    with pytest.raises(InternalError, match="was not prepared"):
        worker.worker.commit(1)
    (assignment,) = site.generation(["a"], "solo")
    number = assignment.generation.id
    worker.worker.release("nowhere")
    worker.worker.abandon(99)
    for _ in range(2):
        worker.worker.prepare(assignment)
    assert worker.worker.report().prepared == {number}
    assert worker.worker.report().kv_blocks == 40
    for _ in range(2):
        worker.worker.commit(number)
        worker.worker.prepare(assignment)
        worker.worker.abandon(number)
    report = worker.worker.report()
    assert (report.serving, report.prepared, report.device, report.parked) == (number, frozenset(), "a", "")
    with clients() as client:
        stream = client.start(worker, PROMPTS[0], 12)
        assert right(stream, loaded)
    with pytest.raises(InternalError, match="has not retired"):
        worker.worker.release("b")
    for _ in range(2):
        worker.worker.stop()
    assert not site.node.held(kv_key("a"), TRUNK_KEY, expert_key(0, 0))
    with pytest.raises(InternalError, match="stopped"):
        worker.worker.prepare(assignment)


def test_streams_run_through_swaps_and_what_was_left_is_let_go(make_site: MakeSite, hire: Hire, loaded: Loaded) -> None:
    site, workers = make_site("a", "b"), [hire(), hire()]
    gc.disable()  # pages must be let go without it
    try:
        first = bring(workers, site.generation(["a", "b"]))
        with clients() as client:
            streams = start_all(client, workers, 90)
            for shift in (1, 2, 3):
                second = bring(workers, site.generation(["a", "b"], shift=shift, threads=1 + shift % 2))
                wait_free(site.node, f"exchange/{first}")
                first = second
            assert all(right(stream, loaded) for stream in streams)
        assert all(w.worker.step_ends_s(0.0) for w in workers)
    finally:
        gc.enable()


def test_only_who_comes_anew_is_warmed_up(
    make_site: MakeSite, hire: Hire, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that serves has run the model; a token more would take its core from the streams."""
    warmed: list[str] = []
    warm_up = mapping._warm_up

    def noted(assignment: Assignment, *parts: Any) -> None:
        warmed.append(f"{assignment.generation.id}:{assignment.rank}")
        warm_up(assignment, *parts)

    monkeypatch.setattr(mapping, "_warm_up", noted)
    site, workers = make_site("a", "b"), [hire(), hire()]
    first = bring(workers[:1], site.generation(["a"], "solo"))
    with clients() as client:
        streams = start_all(client, workers[:1], 60)
        second = bring(workers, site.generation(["a", "b"]))
        assert warmed == [f"{first}:0", f"{second}:1"]
        assert all(right(stream, loaded) for stream in streams)


def test_who_serves_prepares_in_small_pieces(
    make_site: MakeSite, hire: Hire, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its engine would wait for the interpreter for as long as all of it takes; a standby need not rest."""
    steps_s, pieces = list[float](), list[str]()

    class Noted:
        def __init__(self, step_s: float) -> None:
            steps_s.append(step_s)

        def __call__(self) -> None:
            pieces.append(threading.current_thread().name)

    monkeypatch.setattr(worker_module, "Throttle", Noted)
    site, workers = make_site("a", "b"), [hire(), hire()]
    bring(workers[:1], site.generation(["a"], "solo"))
    assert not pieces
    with clients() as client:
        streams = start_all(client, workers[:1], 60)
        assignments = site.generation(["a", "b"])
        bring(workers, assignments)
        assert all(right(stream, loaded) for stream in streams)
    experts = sum(len(held[0]) for held in assignments[0].generation.placement.experts_LD)
    assert len(pieces) > experts
    assert len(set(pieces)) == 1
    assert [step_s > 0 for step_s in steps_s] == [True]


def test_compute_threads_change_at_the_swap_in_the_engines_thread(make_site: MakeSite, hire: Hire) -> None:
    site, worker = make_site("a"), hire()
    bring([worker], site.generation(["a"], "solo", threads=2))
    service = worker.worker._service
    assert service is not None
    assert service.engine.call(torch.get_num_threads) == 2
    bring([worker], site.generation(["a"], "solo", threads=1))
    assert service.engine.call(torch.get_num_threads) == 1
    bring([worker], site.generation(["a"], "solo"))
    assert service.engine.call(torch.get_num_threads) == 1


def test_kv_grows_and_shrinks_under_running_streams(make_site: MakeSite, hire: Hire, loaded: Loaded) -> None:
    site, worker = make_site("a", blocks=12), hire()
    bring([worker], site.generation(["a"], "solo"))
    with clients() as client:
        streams = [client.start(worker, prompt, 30) for prompt in PROMPTS]
        streams[0].wait_for(1)
        mapped = worker.worker.kv_pages()
        assert sorted(mapped) == sorted(site.kv("a"))
        site.node.extend(kv_key("a"), "kv", 48 * site.block_pages)
        fresh = [page for page in site.kv("a") if page not in mapped]
        for _ in range(2):
            grown = worker.worker.resize_kv(60, fresh)
            assert sorted(grown) == sorted(site.kv("a"))
        assert worker.worker.report().kv_blocks == worker.worker.report().load.kv_blocks == 60
        for stream in streams:
            stream.wait_for(3)
        for _ in range(2):
            shrunk = worker.worker.resize_kv(14, ())
            assert len(shrunk) == 14 * site.block_pages
        assert set(shrunk) == set(worker.worker.kv_pages())
        site.node.trim(kv_key("a"), [page for page in site.kv("a") if page not in shrunk])
        assert all(right(stream, loaded) for stream in streams)


def break_exchange(worker: LocalWorker) -> None:
    """Make a worker's engine fail as a defect of ours would."""

    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    service = worker.worker._service
    assert service is not None
    service.part.decoder.forward = fail  # type: ignore[assignment, method-assign]


def test_a_failed_worker_is_replaced_and_the_others_recover(make_site: MakeSite, hire: Hire, loaded: Loaded) -> None:
    site, workers = make_site("a", "b"), [hire(), hire()]
    number = bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        streams = start_all(client, workers, 90)
        break_exchange(workers[1])
        failed = until(workers[1], lambda r: r.failed)
        assert "a defect" in failed.failed
        parked = until(workers[0], lambda r: r.parked)
        assert parked.serving == number
        late = client.start(workers[0], [9, 9, 9], 6)  # accepted while parked
        for _ in range(2):
            workers[0].worker.commit(number)
        assert workers[0].worker.report().parked
        with pytest.raises(InternalError, match="a defect"):
            workers[1].worker.commit(number + 1)
        with pytest.raises(InternalError, match="a defect"):
            workers[1].worker.prepare(site.generation(["a", "b"])[1])
        workers[1].worker.stop()
        for stream in streams[1::2]:
            with pytest.raises(PeerLost):
                stream.end.result(20)
        workers[1] = hire()
        for _ in range(2):
            bring(workers, site.generation(["a", "b"]))
            assert late.finished() == "length"
        again = [client.again(workers[1], stream) for stream in streams[1::2]]
        assert right(late, loaded)
        assert all(right(stream, loaded) for stream in streams[::2])
        assert all(right(stream, loaded, len(old.tokens)) for stream, old in zip(again, streams[1::2], strict=True))
        for stream in again:
            assert stream.cached_tokens == len(stream.prompt) - 1


def test_a_worker_is_told_that_a_peer_is_lost(make_site: MakeSite, hire: Hire, loaded: Loaded) -> None:
    site, workers = make_site("a", "b"), [hire(), hire()]
    number = bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        streams = start_all(client, workers, 60)
        workers[0].worker.park(number + 1, 0.01)
        assert workers[0].worker.report().parked == "", "another generation"
        workers[0].worker.park(number, 20.0)
        assert "the controller knows that a member is lost" in workers[0].worker.report().parked
        until(workers[1], lambda r: r.parked)
        bring(workers, site.generation(["a", "b"]))
        workers[0].worker.park(number, 0.01)
        assert all(stream.finished() == "length" and right(stream, loaded) for stream in streams)
        assert workers[0].worker.report().parked == ""


def test_an_engine_that_hangs_is_told_from_one_that_waits_for_it(make_site: MakeSite, hire: Hire) -> None:
    """Both processes answer; one engine is stuck in what it does at a boundary, the other one in the exchange."""
    site, workers = make_site("a", "b"), [hire(), hire()]
    bring(workers, site.generation(["a", "b"], timeout_s=2.0))
    with clients() as client:
        assert all(stream.finished() == "length" for stream in start_all(client, workers, 8))  # both loops turn
    service, woken = workers[0].worker._service, threading.Event()
    assert service is not None
    stuck = threading.Thread(target=service.engine.call, args=(woken.wait,))
    stuck.start()
    try:
        hung = until(workers[0], lambda r: r.failed)
        parked = until(workers[1], lambda r: r.parked or r.failed)
    finally:
        woken.set()
        stuck.join()
    assert "no progress for 2 s" in hung.failed
    assert "no sign of life for 2 s" in parked.parked
    assert not parked.failed
    parked = until(workers[0], lambda r: r.parked)  # it was slow, not stuck, if anybody had waited
    assert not parked.failed


def test_an_engine_alone_that_hangs_is_found_and_one_without_work_is_not(make_site: MakeSite, hire: Hire) -> None:
    site, worker = make_site("a"), hire()
    bring([worker], site.generation(["a"], "solo", timeout_s=1.0))
    service, woken = worker.worker._service, threading.Event()
    assert service is not None
    service.engine.config = replace(service.engine.config, idle_wait_s=30.0)
    service.engine.call(lambda: None)
    for _ in range(25):  # far longer than the time-out, and far less than it sleeps
        time.sleep(0.1)
        assert not worker.worker.report().failed
    stuck = threading.Thread(target=service.engine.call, args=(woken.wait,))
    stuck.start()
    try:
        assert "no progress for 1 s" in until(worker, lambda r: r.failed).failed
    finally:
        woken.set()
        stuck.join()
    until(worker, lambda r: not r.failed and not r.parked)


def test_a_peer_that_leaves_parks_who_is_told_to_go_on_alone(make_site: MakeSite, hire: Hire, loaded: Loaded) -> None:
    """The second of three parks and then has no part in what comes: it retires at once."""
    site, workers = make_site("a", "b", "c"), [hire(), hire(), hire()]
    bring(workers, site.generation(["a", "b", "c"]))
    with clients() as client:
        streams = start_all(client, workers, 60)
        break_exchange(workers[2])
        for worker in workers[:2]:
            until(worker, lambda r: r.parked)
        bring(workers[:1], site.generation(["a"], "solo"), workers[1])
        workers[1].worker.release("a")
        assert streams[1].finished() == "moved"
        assert right(streams[0], loaded)


@pytest.mark.parametrize("way", ["mapped", "copied", "copied over TCP"])
def test_a_worker_that_leaves_hands_its_streams_over(make_site: MakeSite, hire: Hire, loaded: Loaded, way: str) -> None:
    separate, far = way != "mapped", way == "copied over TCP"
    room = 110  # for all four streams, however far they have come
    site, workers = make_site("a", "b", blocks=room, separate=separate), [hire(), hire()]
    bring(workers, site.generation(["a", "b"]))
    gc.disable()
    try:
        with clients() as client:
            streams = start_all(client, workers, 90)
            lent = workers[1].worker.lend("node")
            assert lent is not None
            number = bring(workers[:1], site.generation(["a"], "solo"), workers[1])
            workers[1].worker.commit(number)
            with pytest.raises(InternalError, match="waits to be released"):
                workers[1].worker.prepare(site.generation(["a", "b"])[1])
            for _ in range(2):
                pages = workers[0].worker.adopt_kv(site.source("b", far=far), room)
            adopted = set() if separate else set(pages) & set(site.kv("b"))
            assert bool(adopted) != separate
            for _ in range(2):
                workers[1].worker.release("a")
            if adopted:
                site.node.move_pages(kv_key("b"), sorted(adopted), kv_key("a"), "kv")
            moved = streams[1::2]
            assert [(s.finished(), s.end.result().moved_to) for s in moved] == [("moved", "a")] * 2
            again = [client.again(workers[0], stream) for stream in moved]
            assert all(right(new, loaded, len(old.tokens)) for new, old in zip(again, moved, strict=True))
            assert [s.cached_tokens for s in again] == [len(s.prompt) - 1 for s in again]
            assert all(right(stream, loaded) for stream in streams[::2])
        report = workers[1].worker.report()
        assert (report.serving, report.retired, report.device, report.kv_blocks) == (0, 0, "", 0)
        with pytest.raises(InternalError):
            fetch_pool(lent, site.node.config.token)  # nobody would need it here any more
        site.owners["b"].free(kv_key("b"))
        site.owners["b"].allocate(kv_key("b"), "kv", 20 * site.block_pages)
        bring(workers, site.generation(["a", "b"]))
        with clients() as client:
            assert right(client.start(workers[1], PROMPTS[2], 9), loaded)
    finally:
        gc.enable()


def test_adoption_keeps_to_the_blocks_it_is_given(make_site: MakeSite, hire: Hire) -> None:
    site, workers = make_site("a", "b"), [hire(), hire()]
    bring(workers, site.generation(["a", "b"]))
    with clients() as client:
        for worker, first in ((workers[0], 1), (workers[1], 2)):
            for i in range(4):
                assert client.start(worker, [first, i, *range(20)], 1).finished() == "length"
        bring(workers[:1], site.generation(["a"], "solo"), workers[1])
        pages = workers[0].worker.adopt_kv(site.source("b"), 24)
        assert len(pages) == 24 * site.block_pages
        assert set(pages) & set(site.kv("b"))
        last = client.start(workers[0], [2, 3, *range(20)], 2)
        assert last.finished() == "length"
        assert last.cached_tokens == 21


@pytest.mark.parametrize("separate", [False, True])
def test_a_device_taken_over_keeps_its_prefixes(
    make_site: MakeSite, hire: Hire, loaded: Loaded, separate: bool
) -> None:
    site, worker = make_site("a", separate=separate), hire()
    bring([worker], site.generation(["a"], "solo"))
    with clients() as client:
        stream = client.start(worker, PROMPTS[3], 130)  # long enough not to end before the worker does
        stream.wait_for(20)
        worker.worker.stop()
        with pytest.raises(PeerLost):
            stream.end.result(20)
        heir = hire()
        bring([heir], site.generation(["a"], "solo"))
        again = client.again(heir, stream)
        assert right(again, loaded, len(stream.tokens))
        assert again.cached_tokens == len(again.prompt) - 1


def test_abandoning_takes_back_what_was_prepared_offered_or_is_joining(
    make_site: MakeSite, hire: Hire, loaded: Loaded
) -> None:
    site, workers = make_site("a", "b"), [hire(), hire()]
    gc.disable()
    try:
        number = bring(workers, site.generation(["a", "b"]))
        with clients() as client:
            streams = start_all(client, workers, 60)
            offered = prepare(workers, site.generation(["a", "b"], shift=1))
            workers[0].worker.commit(offered)  # the other one never comes
            began_s = time.monotonic()
            workers[0].worker.wait_for_boundary(offered, 0.05)
            assert time.monotonic() - began_s >= 0.05
            for worker in workers:
                for _ in range(2):
                    worker.worker.abandon(offered)
                with pytest.raises(InternalError, match="was abandoned"):
                    worker.worker.commit(offered)
                assert worker.worker.report().prepared == frozenset()
                assert worker.worker.report().serving == number
            wait_free(site.node, f"exchange/{offered}")
            leave = prepare(workers[:1], site.generation(["a"], "solo"))
            workers[1].worker.commit(leave)  # would retire
            together(*(lambda w=w: w.worker.abandon(leave) for w in workers))  # type: ignore[misc]
            number = prepare(workers, site.generation(["a", "b"]))
            together(*(lambda w=w: come(w.worker, number) for w in workers))  # type: ignore[misc]
            assert [w.worker.report().serving for w in workers] == [number] * 2
            assert all(right(stream, loaded) for stream in streams)
    finally:
        gc.enable()


def come(worker: Worker, generation: int) -> None:
    """Commit, and wait for the boundary."""
    worker.commit(generation)
    worker.wait_for_boundary(generation, 20)


def test_abandoning_an_idle_worker_frees_everything(make_site: MakeSite, hire: Hire) -> None:
    site, worker = make_site("a", "b"), hire()
    (assignment,) = site.generation(["a"], "solo")
    worker.worker.prepare(assignment)
    assert site.node.held(kv_key("a"), TRUNK_KEY)
    worker.worker.abandon(assignment.generation.id)
    assert not site.node.held(kv_key("a"), TRUNK_KEY, expert_key(0, 0))
    with pytest.raises(InternalError, match="was abandoned"):
        worker.worker.prepare(assignment)
    bring([worker], site.generation(["b"], "solo"))
    assert worker.worker.report().device == "b"
    with pytest.raises(InternalError, match="cannot take a too"):
        worker.worker.prepare(site.generation(["a"], "solo")[0])


def test_abandoned_while_it_joins(make_site: MakeSite, hire: Hire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither reports nor another generation wait for it; it closes its part when it comes back."""
    site, worker = make_site("a"), hire()
    (slow,), (quick,) = site.generation(["a"], "solo"), site.generation(["a"], "solo")
    gate, joining, real = threading.Event(), threading.Event(), mapping._exchange

    def wait(assignment: object, *rest: object) -> object:
        if assignment is slow:
            joining.set()
            assert gate.wait(20)
        return real(assignment, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(mapping, "_exchange", wait)
    errors: list[Exception] = []

    def join() -> None:
        try:
            worker.worker.prepare(slow)
        except InternalError as e:
            errors.append(e)

    threads = [threading.Thread(target=join) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert joining.wait(20)
    assert worker.worker.report().joining == {slow.generation.id}
    worker.worker.abandon(slow.generation.id)
    report = worker.worker.report()
    assert (report.prepared, report.joining, report.abandoned) == (frozenset(), frozenset(), slow.generation.id)
    worker.worker.prepare(quick)
    worker.worker.abandon(quick.generation.id)
    gate.set()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 2
    assert all("abandoned" in str(e) for e in errors)
    assert worker.worker.report().prepared == frozenset()
    errors.clear()
    assert not site.node.held(kv_key("a"), TRUNK_KEY)


def test_a_generation_that_cannot_be_mapped_harms_nobody(make_site: MakeSite, hire: Hire) -> None:
    site, worker = make_site("a"), hire()
    (assignment,) = site.generation(["a"], "solo")
    lost = type(assignment.node)("node", "@nobody", "x", assignment.node.pages)
    with pytest.raises(InternalError, match="no answer"):
        worker.worker.prepare(type(assignment)(assignment.generation, 0, lost, lost))
    bring([worker], [assignment])
    with pytest.raises(InternalError, match="no answer"):
        worker.worker.prepare(type(assignment)(site.generation(["a"], "solo")[0].generation, 0, lost, lost))
    assert worker.worker.report().serving == assignment.generation.id


def test_watch_returns_when_the_situation_changes(make_site: MakeSite, hire: Hire) -> None:
    site, worker = make_site("a"), hire()
    (assignment,) = site.generation(["a"], "solo")
    seen = worker.worker.report()
    began_s = time.monotonic()
    assert worker.worker.watch(seen, 0.05).situation == seen.situation
    assert time.monotonic() - began_s >= 0.05
    timer = threading.Timer(0.05, worker.worker.prepare, [assignment])
    timer.start()
    seen = worker.worker.watch(seen, 20)
    assert seen.prepared == {assignment.generation.id}
    timer.join()
    worker.worker.commit(assignment.generation.id)
    assert worker.worker.watch(seen, 20).serving == assignment.generation.id


def test_a_pool_is_lent_to_its_next_owner(make_site: MakeSite, hire: Hire, loaded: Loaded) -> None:
    site, worker = make_site("a"), hire()
    assert worker.worker.lend("node") is None  # it maps nothing yet
    bring([worker], site.generation(["a"], "solo"))
    config = site.node.config
    kv = site.kv("a")
    with clients() as client:
        stream = client.start(worker, PROMPTS[1], 50)
        site.node.close()
        address = worker.worker.lend("node")
        assert worker.worker.lend("node") == address
        site.node = site.owners["a"] = MemoryOwner.adopt(config, address)
        assert site.kv("a") == kv
        assert site.node.held(kv_key("a"))
        bring([worker], site.generation(["a"], "solo"))
        assert right(stream, loaded)
    assert worker.worker.lend("other") is None


def test_a_pool_is_lent_by_who_only_joins(make_site: MakeSite, hire: Hire, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have mapped its pages: an empty pool of that name must not come beside them."""
    site, worker = make_site("a"), hire()
    (first,) = site.generation(["a"], "solo")
    join, joins, go_on = worker_module.join, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        joins.set()
        assert go_on.wait(20)
        return join(*arguments)

    monkeypatch.setattr(worker_module, "join", slow)
    joining = threading.Thread(target=worker.worker.prepare, args=(first,))
    joining.start()
    try:
        assert joins.wait(20)
        address = worker.worker.lend("node")
        assert address is not None
        lent = fetch_pool(address, TOKEN)
        assert os.path.sameopenfile(lent.fd, site.node.pool.fd)
        lent.close()
    finally:
        go_on.set()
        joining.join()
    assert worker.worker.report().prepared


def test_a_worker_without_a_role_lends_nothing_any_more(make_site: MakeSite, hire: Hire) -> None:
    """It would keep the memory of a pool that everybody else has let go."""
    site, worker = make_site("a"), hire()
    (assignment,) = site.generation(["a"], "solo")
    worker.worker.prepare(assignment)
    address = worker.worker.lend("node")
    fetch_pool(address or "", TOKEN).close()
    worker.worker.abandon(assignment.generation.id)
    with pytest.raises(InternalError):
        fetch_pool(address or "", TOKEN)
    assert worker.worker.lend("node") is None


def test_another_pool_of_the_same_name_is_lent_anew(make_site: MakeSite, hire: Hire) -> None:
    site, worker, pools = make_site("a"), hire(), [MemfdBackend().create(PoolGeometry("node", 8, 4096)) for _ in "ab"]
    addresses = []
    for pool in pools:
        worker.worker._joining[1] = site.generation(["a"], "solo")[0], {"node": pool}
        addresses += [worker.worker.lend("node"), worker.worker.lend("node")]
        assert os.path.sameopenfile(fetch_pool(addresses[-1] or "", TOKEN).fd, pool.fd)
    assert addresses[0] == addresses[1] != addresses[2] == addresses[3]
    with pytest.raises(InternalError):
        fetch_pool(addresses[0] or "", TOKEN)
    worker.worker._joining.clear()


def test_who_comes_late_to_an_abandoned_generation_leaves_its_pages_alone(make_site: MakeSite) -> None:
    """They may be another generation's, or KV, by then."""
    site = make_site("a", "b")
    assignment = site.generation(["a", "b"])[0]
    pools = mapping.fetch_pools(assignment)
    region = site.node.extent(assignment.generation.exchange_key).pages
    with pytest.raises(InternalError, match=r"generation \d+: it was abandoned"):
        mapping.join(assignment, pools, DeviceKV, lambda: True)
    assert not any(any(os.pread(site.node.pool.fd, PAGE, page * PAGE)) for page in region)


def test_calls_from_many_threads_at_once(make_site: MakeSite, hire: Hire, loaded: Loaded) -> None:
    """Everything is said three times at once, while others ask, resize, and prepare what never comes."""
    site, workers = make_site("a", "b", blocks=60), [hire(), hire()]
    bring(workers, site.generation(["a", "b"]))
    over = threading.Event()
    errors: list[BaseException] = []

    def again(call: Callable[[], object]) -> None:
        try:
            while not over.is_set():
                call()
        except BaseException as e:  # noqa: BLE001 - raised by the test
            errors.append(e)

    def resize(worker: LocalWorker, device: str) -> None:
        worker.worker.resize_kv(40, ())
        worker.worker.resize_kv(60, site.kv(device))

    calls: list[Callable[[], object]] = [lambda w=w: w.worker.report() for w in workers]  # type: ignore[misc]
    calls += [lambda w=w: w.worker.watch(w.worker.report(), 0.01) for w in workers]  # type: ignore[misc]
    calls += [lambda w=w, d=d: resize(w, d) for w, d in zip(workers, "ab", strict=True)]  # type: ignore[misc]
    calls += [lambda: workers[0].worker.abandon(1000)]
    threads = [threading.Thread(target=again, args=(call,)) for call in calls]
    with clients() as client:
        streams = start_all(client, workers, 60)
        for thread in threads:
            thread.start()
        for shift in range(4):
            lost = site.generation(["a", "b"])
            prepare([*workers, *workers], [*lost, *lost])
            wanted = site.generation(["a", "b"], shift=shift)
            prepare([*workers] * 3, [*wanted] * 3)
            number = wanted[0].generation.id
            together(*(lambda w=w: w.worker.abandon(lost[0].generation.id) for w in workers * 3))  # type: ignore[misc]  # noqa: B023
            together(*(lambda w=w: w.worker.commit(number) for w in workers * 3))  # type: ignore[misc]  # noqa: B023
            for worker in workers:
                until(worker, lambda r: r.serving == number and not r.prepared)  # noqa: B023
        over.set()
        for thread in threads:
            thread.join(20)
        assert not errors
        assert all(right(stream, loaded) for stream in streams)
        assert [w.worker.report().kv_blocks for w in workers] == [60, 60]
