"""I4: a sequence that changes workers gives the tokens it would have given; nothing is left outstanding."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from concertina.errors import InternalError, OperatorError
from concertina.orchestrator.ingress.following import follow
from concertina.orchestrator.ingress.members import Member, NoWorker, Roster, StreamLost
from concertina.orchestrator.ingress.prefixes import BLOCK, PrefixMemory
from concertina.orchestrator.ingress.router import Router
from concertina.workers.engine.errors import CacheTooSmall, NeverFits, QueueFull
from concertina.workers.protocol import EngineLoad, EngineOutput, EngineRequest, SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st

from .toy import ToyWorker, connect_to, walk

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(20):
            return await work

    return asyncio.run(bounded())


async def routed(workers: Sequence[ToyWorker], wait_s: float = 0.2, recovery_s: float = 0.5) -> Router:
    router = Router(connect_to(workers), wait_s, recovery_s)
    router.update([w.member for w in workers])
    await until(lambda: all(lane.connected for lane in router.lanes))
    return router


@asynccontextmanager
async def buried(router: Router, workers: Sequence[ToyWorker]) -> AsyncIterator[None]:
    """Somebody takes the dead off the list meanwhile."""

    async def bury() -> None:
        while True:
            router.update([lane.member for lane in router.lanes if not worker_of(workers, lane.member.name).down])
            await asyncio.sleep(0.001)

    task = asyncio.create_task(bury())
    yield
    task.cancel()


def worker_of(workers: Sequence[ToyWorker], name: str) -> ToyWorker:
    return next(w for w in workers if w.name == name)


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def ask(name: str = "r", prompt: Sequence[int] = (5, 6, 7), **sampling: Any) -> EngineRequest:
    return EngineRequest(name, tuple(prompt), SamplingParams(**{"max_tokens": 20, "seed": 3, **sampling}))


async def collect(router: Router, request: EngineRequest, into: list[EngineOutput] | None = None) -> list[EngineOutput]:
    outputs = [] if into is None else into
    async for output in router.stream(request):
        outputs.append(output)
    return outputs


async def collect_rest(stream: AsyncGenerator[EngineOutput, None], into: list[EngineOutput]) -> None:
    async for output in stream:
        into.append(output)


def tokens_of(outputs: Sequence[EngineOutput]) -> list[int]:
    return [t for output in outputs for t in output.token_ids]


def reference(request: EngineRequest) -> list[int]:
    tokens = list(request.prompt)
    for _ in range(request.sampling.max_tokens):
        tokens.append(walk(tokens, request.sampling.seed or 0))
    return tokens[len(request.prompt) :]


def test_what_a_worker_sends_on_is_resumed_and_what_it_refuses_is_not() -> None:
    async def main() -> None:
        full, leaver, _ = workers = [ToyWorker(name, device=name) for name in ("full", "leaver", "heir")]
        full.refuse = QueueFull("full")
        router = await routed(workers)
        router.update([replace(worker.member, speed=10.0**-i) for i, worker in enumerate(workers)])
        leaver.hand_over("heir")
        assert tokens_of(await collect(router, ask())) == reference(ask())
        assert [[request.resumed for request in worker.requests] for worker in workers] == [[False], [False], [True]]
        await router.close()

    run(main())


def test_what_a_device_had_computed_is_known_to_be_its_heirs() -> None:
    """Also what was generated, and if no sequence ran there as it left."""

    async def main() -> None:
        workers = [ToyWorker(name, device=name) for name in ("a", "b", "c")]
        router = await routed(workers)
        router.update([workers[0].member])
        prompt = tuple(range(5, 5 + BLOCK // 2))
        async with aclosing(router.stream(ask("first", prompt, max_tokens=BLOCK))) as outputs:
            tokens = [*prompt]
            async for output in outputs:  # its reader stops at the last one
                tokens += output.token_ids
                if output.finish_reason:
                    break
        router.update([worker.member for worker in workers[1:]], heirs={"a": "c"})
        await until(lambda: all(lane.connected for lane in router.lanes))
        await collect(router, ask("second", tokens))
        assert [len(worker.requests) for worker in workers] == [1, 0, 1]
        await router.close()

    run(main())


def test_streams_to_the_end() -> None:
    async def main() -> None:
        worker = ToyWorker(batch=3)
        router = await routed([worker])
        outputs = await collect(router, ask())
        assert tokens_of(outputs) == reference(ask())
        assert [o.finish_reason for o in outputs][-1] == "length"
        assert [(lane.outstanding, lane.sequences) for lane in router.lanes] == [(0, 0)]
        assert worker.aborted == []
        await router.close()

    run(main())


@settings(max_examples=30, deadline=None)
@given(
    deaths=st.lists(st.integers(0, 6), max_size=4),
    batch=st.integers(1, 3),
    politely=st.booleans(),
    logprobs=st.sampled_from([None, 1]),
)
def test_lost_workers_change_nothing(deaths: list[int], batch: int, politely: bool, logprobs: int | None) -> None:
    """I4, for workers that die (or give their sequences up) at any token."""

    async def main() -> None:
        mortal = [
            ToyWorker(f"w{i}", batch=batch, **{"give_up_after" if politely else "die_after": n})
            for i, n in enumerate(deaths)
        ]
        last = ToyWorker("last", batch=batch)
        router = await routed([*mortal, last])
        router.update([*(w.member for w in mortal), Member("last", "toy", 1, speed=1e-6)])
        request = ask(logprobs=logprobs, min_tokens=4)
        async with buried(router, [*mortal, last]):
            outputs = await collect(router, request)
        assert tokens_of(outputs) == reference(request)
        assert all(output.id == request.id for output in outputs)
        assert [o.finish_reason for o in outputs if o.finish_reason] == ["length"]
        assert sum(len(o.logprobs) for o in outputs) == (20 if logprobs else 0)
        for worker in (*mortal, last):
            for seen in worker.requests:
                done = len(seen.prompt) - len(request.prompt)
                assert seen.sampling.max_tokens == 20 - done
                assert seen.sampling.min_tokens == max(0, 4 - done)
        assert all(lane.outstanding == lane.sequences == 0 for lane in router.lanes)
        await router.close()

    run(main())


def test_gives_up_in_time() -> None:
    async def main() -> None:
        worker = ToyWorker(die_after=4)
        router = await routed([worker], recovery_s=0.05)
        outputs: list[EngineOutput] = []
        with pytest.raises(StreamLost, match=r"within 0\.05 s"):
            await collect(router, ask(), outputs)
        assert tokens_of(outputs) == reference(ask())[:4]
        await router.close()

    run(main())


def test_a_request_that_kills_workers_is_given_up() -> None:
    async def main() -> None:
        workers = [ToyWorker(f"w{i}", die_after=0, load=EngineLoad()) for i in range(10)]
        router = await routed(workers)
        async with buried(router, workers):
            with pytest.raises(StreamLost, match="8 workers in turn"):
                await collect(router, ask())
        assert sum(w.down for w in workers) == 8
        await router.close()

    run(main())


def test_one_that_only_waits_its_turn_is_not_blamed() -> None:
    """Its workers die in turn, more often than a request may kill, while others are computed."""

    async def main() -> None:
        workers = [ToyWorker(f"w{i}", load=EngineLoad(waiting=1)) for i in range(20)]
        for worker in workers[:-1]:
            worker.gate.clear()
        router = Router(connect_to(workers), 5, 5)
        router.update([workers[0].member])
        waiting = asyncio.create_task(collect(router, ask()))
        for before, after in pairwise(workers):
            await until(lambda w=before: w.requests)
            before.kill()
            router.update([after.member])
        assert tokens_of(await waiting) == reference(ask())
        await router.close()

    run(main())


def test_a_crash_loop_ends_even_for_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concertina.orchestrator.ingress.router.PAUSE_S", 0.001)

    async def main() -> None:
        worker = ToyWorker(load=EngineLoad(waiting=1))
        worker.gate.clear()
        router = await routed([worker])
        waiting = asyncio.create_task(collect(router, ask()))
        for i in range(32):
            await until(lambda i=i: len(worker.requests) > i)
            worker.cut()
        with pytest.raises(StreamLost, match="32 workers in turn"):
            await waiting
        await router.close()

    run(main())


def test_waits_for_a_worker_but_not_for_ever() -> None:
    async def main() -> None:
        worker = ToyWorker()
        router = Router(connect_to([worker]), worker_wait_s=0.02)
        with pytest.raises(NoWorker):
            await collect(router, ask())
        router = Router(connect_to([worker]), worker_wait_s=10)
        task = asyncio.create_task(collect(router, ask()))
        await asyncio.sleep(0)
        router.update([worker.member])
        assert tokens_of(await task) == reference(ask())
        await router.close()

    run(main())


def test_reconnects() -> None:
    async def main() -> None:
        worker = ToyWorker(die_after=5)
        router = await routed([worker], recovery_s=10)
        stream = router.stream(ask())
        got = [await anext(stream) for _ in range(5)]
        task = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await until(lambda: worker.down)
        worker.die_after, worker.down = None, False
        got += [await task, *[output async for output in stream]]
        assert tokens_of(got) == reference(ask())
        await router.close()

    run(main())


def test_notices_an_idle_connection_that_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concertina.orchestrator.ingress.lane.CHECK_S", 0.01)
    monkeypatch.setattr("concertina.orchestrator.ingress.lanes.GRACE_S", 0.0)

    async def main() -> None:
        worker = ToyWorker()
        router = await routed([worker])
        worker.down = True
        assert not router.ready
        await asyncio.sleep(0.1)
        worker.down = False
        assert not router.ready or next(iter(router.lanes)).connected
        await until(lambda: router.ready)
        await router.close()

    run(main())


def test_closing_a_stream_aborts_it() -> None:
    async def main() -> None:
        worker = ToyWorker()
        router = await routed([worker])
        stream = router.stream(ask("mine", max_tokens=1000))
        await anext(stream)
        await stream.aclose()
        assert worker.aborted == ["mine"]
        assert [lane.outstanding for lane in router.lanes] == [0]
        await router.close()

    run(main())


def test_least_loaded_gets_the_next() -> None:
    async def main() -> None:
        workers = [ToyWorker("w0"), ToyWorker("w1")]
        router = await routed(workers)
        streams = [router.stream(ask(f"r{i}", prompt=[9 + i], max_tokens=100)) for i in range(6)]
        for stream in streams:
            await anext(stream)
        assert [len(w.requests) for w in workers] == [3, 3]
        router.update([Member("w0", "toy", 1), Member("w1", "toy", 1, speed=100.0)])
        for i in range(4):
            await anext(router.stream(ask(f"s{i}", prompt=[99], max_tokens=100)))
        assert [len(w.requests) for w in workers] == [3, 7]
        await router.close()

    run(main())


def test_same_prefix_goes_to_the_same_worker() -> None:
    async def main() -> None:
        workers = [ToyWorker("w0"), ToyWorker("w1")]
        router = await routed(workers)
        long = list(range(3, 3 + 4 * BLOCK))
        await collect(router, ask(prompt=long))
        home = next(w for w in workers if w.requests)
        busy = router.stream(ask(prompt=[*long, 1], max_tokens=100))
        await anext(busy)
        await collect(router, ask(prompt=[*long, 2]))
        assert len(home.requests) == 3
        await busy.aclose()
        await router.close()

    run(main())


def test_draining_and_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draining lets sequences end where they are; leaving moves those that cannot end in a moment."""
    monkeypatch.setattr("concertina.orchestrator.ingress.lanes.LINGER_S", 0.01)

    async def main() -> None:
        workers = [ToyWorker("old")]
        router = await routed(workers)
        (old,), new = workers, ToyWorker("new")
        workers.append(new)
        stream = router.stream(ask(max_tokens=30))
        got = [await anext(stream)]
        router.update([Member("old", "toy", 1, draining=True), new.member])
        await until(lambda: router.ready)
        await collect(router, ask("second"))
        got.append(await anext(stream))
        assert [len(old.requests), len(new.requests)] == [1, 1]
        old.gate.clear()
        router.update([new.member])
        got += [output async for output in stream]
        assert tokens_of(got) == reference(ask(max_tokens=30))
        assert [len(old.requests), len(new.requests)] == [1, 2]
        await router.close()

    run(main())


def test_follows_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that fails is asked again, and the members stay until it answers."""
    monkeypatch.setattr("concertina.orchestrator.ingress.following.RETRY_S", 0.001)

    async def main() -> None:
        workers, asked = [ToyWorker("w0"), ToyWorker("w1")], 0

        async def source() -> AsyncIterator[Roster]:
            nonlocal asked
            asked += 1
            if asked == 2:
                raise InternalError("restarting")
            yield Roster()  # a source that knows nobody yet
            yield Roster(tuple(w.member for w in workers[:asked]), frozenset({"x"}))

        router = Router(connect_to(workers))
        task = asyncio.create_task(follow(router, source))
        await until(lambda: asked >= 2)
        assert [lane.member.name for lane in router.lanes] == ["w0"]
        await until(lambda: len(router.lanes) == 2)
        assert router.awaited == {"x"}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await router.close()

    run(main())


def test_a_new_address_is_a_new_worker() -> None:
    async def main() -> None:
        worker = ToyWorker()
        router = await routed([worker])
        before = next(iter(router.lanes))
        router.update([worker.member])
        assert next(iter(router.lanes)) is before
        router.update([Member(worker.name, "toy", 2)])
        assert next(iter(router.lanes)) is not before
        with pytest.raises(OperatorError, match="speed"):
            Member("slow", "toy", 1, speed=0)
        with pytest.raises(OperatorError, match="names repeat"):
            router.update([worker.member, worker.member])
        await router.close()

    run(main())


def test_full_queues() -> None:
    async def main() -> None:
        full, free = ToyWorker("full", refuse=QueueFull("full")), ToyWorker("free")
        router = await routed([full, free])
        for i in range(3):
            assert tokens_of(await collect(router, ask(f"r{i}"))) == reference(ask())
        free.refuse = QueueFull("full too")
        with pytest.raises(QueueFull, match="every worker"):
            await collect(router, ask())
        free.refuse = NeverFits("too long")
        with pytest.raises(NeverFits):
            await collect(router, ask())
        await router.close()

    run(main())


def test_what_one_cache_cannot_hold_goes_where_there_is_more_memory() -> None:
    async def main() -> None:
        small, large = workers = [ToyWorker("small", refuse=CacheTooSmall("has 8")), ToyWorker("large")]
        router = await routed(workers)
        for worker in small, large:
            router.update([replace(w.member, speed=10.0 if w is worker else 1.0) for w in workers])
            assert tokens_of(await collect(router, ask())) == reference(ask())
        large.refuse = CacheTooSmall("has 9")
        with pytest.raises(CacheTooSmall):
            await collect(router, ask())
        for first, second in (workers, workers[::-1]):
            first.refuse, second.refuse = QueueFull("full"), CacheTooSmall("has 9")
            with pytest.raises(QueueFull):  # it would be taken later
                await collect(router, ask())
        await router.close()

    run(main())


def test_what_no_cache_can_hold_waits_for_a_device_that_is_awaited() -> None:
    async def main() -> None:
        small, coming = workers = [ToyWorker("small", refuse=CacheTooSmall("has 8")), ToyWorker("coming", device="d1")]
        router = await routed(workers)
        coming.connect_s = 0.05
        router.update([small.member], awaited={"d1"})
        asking = asyncio.create_task(collect(router, ask()))
        await until(lambda: small.requests)
        router.update([small.member, coming.member])
        assert tokens_of(await asking) == reference(ask())
        router.update([small.member], awaited={"d1"})
        with pytest.raises(NoWorker, match="s: has 8"):
            await collect(router, ask())
        await router.close()

    run(main())


def test_who_waits_for_a_worker_waits_for_the_connection_to_it() -> None:
    """It is not awaited any more as soon as it is listed."""

    async def main() -> None:
        coming = ToyWorker("coming", device="d1", connect_s=0.1)
        router = Router(connect_to([coming]), 0.05, 5.0)
        router.update([], awaited={"d1"})
        asking = asyncio.create_task(collect(router, ask()))
        await asyncio.sleep(0.1)
        router.update([coming.member])
        assert tokens_of(await asking) == reference(ask())
        await router.close()

    run(main())


def test_sequences_of_a_lost_worker_go_to_who_has_their_kv_however_many() -> None:
    async def main() -> None:
        killed, idle, successor = workers = [ToyWorker(n, device=d) for n, d in (("a", "d0"), ("b", "d1"), ("c", "d0"))]
        router = await routed(workers)
        router.update([killed.member, replace(idle.member, speed=0.001)])
        streams = [router.stream(ask(f"r{i}")) for i in range(4)]
        got = [[await anext(stream)] for stream in streams]
        killed.kill()
        router.update([replace(idle.member, speed=1000.0), successor.member])
        await asyncio.gather(*(collect_rest(stream, outputs) for stream, outputs in zip(streams, got, strict=True)))
        assert [tokens_of(outputs) for outputs in got] == [reference(ask())] * 4
        assert [len(worker.requests) for worker in workers] == [4, 0, 4]
        await router.close()

    run(main())


def test_what_no_longer_fits_goes_on_elsewhere_and_waits_for_room() -> None:
    """A device that takes over experts of a lost node may keep too little KV for what it runs."""

    async def main() -> None:
        shrinks, other = workers = [ToyWorker("shrinks"), ToyWorker("other", refuse=CacheTooSmall("has 9"))]
        router = await routed(workers)
        got: list[EngineOutput] = []
        stream = router.stream(ask())
        got.append(await anext(stream))
        shrinks.moved_to, shrinks.refuse = "", CacheTooSmall("has 8")
        rest = asyncio.ensure_future(collect_rest(stream, got))
        await until(lambda: other.requests)
        other.refuse = None
        router.update([worker.member for worker in workers])  # or a second later
        await rest
        assert tokens_of(got) == reference(ask())
        assert other.requests[-1].resumed

        other.moved_to, other.refuse = "", CacheTooSmall("has 9")
        shrinks.moved_to = shrinks.refuse = None
        stream = router.stream(ask())
        await anext(stream)
        shrinks.moved_to, shrinks.refuse = "", CacheTooSmall("has 8")
        with pytest.raises(StreamLost, match=r"within 0\.5 s: has"):
            await collect_rest(stream, [])
        await router.close()

    run(main())


def test_who_was_full_once_may_be_the_heir() -> None:
    """It has the sequence's KV; a third worker, free as it is, has not."""

    async def main() -> None:
        heir = ToyWorker("heir", device="d0", refuse=QueueFull("full"))
        leaver, third = ToyWorker("leaver", device="d1"), ToyWorker("third", device="d2")
        router = await routed([heir, leaver, third])
        stream = router.stream(ask())
        got = [await anext(stream)]
        assert [len(w.requests) for w in (heir, leaver, third)] == [1, 1, 0]
        heir.refuse = None
        leaver.hand_over("d0")
        got += [output async for output in stream]
        assert tokens_of(got) == reference(ask())
        assert [len(w.requests) for w in (heir, leaver, third)] == [2, 1, 0]
        await router.close()

    run(main())


def test_an_interrupted_sequence_waits_for_room() -> None:
    async def main() -> None:
        dying, full = ToyWorker("dying", die_after=3), ToyWorker("full", refuse=QueueFull("full"))
        router = await routed([dying, full], recovery_s=10)
        task = asyncio.create_task(collect(router, ask()))
        await until(lambda: dying.down)
        router.update([full.member])
        await until(lambda: full.requests)
        full.refuse = None
        assert tokens_of(await task) == reference(ask())
        await router.close()

    run(main())


def test_prefix_memory_of_a_device_that_left() -> None:
    memory = PrefixMemory()
    memory.remember([1] * BLOCK, "a")
    memory.inherit("a", "b")
    assert memory.longest([1] * BLOCK) == {"b": BLOCK}
    memory.remember([2] * BLOCK, "b")
    memory.inherit("b", "c")
    memory.inherit("c", "a")
    assert memory.longest([2] * BLOCK) == memory.longest([1] * BLOCK) == {"a": BLOCK}


def test_prefix_memory_of_a_device_that_comes_again() -> None:
    """It is empty: what it had before stays with who took it over."""
    memory = PrefixMemory()
    memory.remember([1] * BLOCK, "a")
    memory.inherit("a", "b")
    memory.remember([2] * BLOCK, "a")
    assert memory.longest([1] * BLOCK) == {"b": BLOCK}
    assert memory.longest([2] * BLOCK) == {"a": BLOCK}
    memory.inherit("b", "a")
    memory.inherit("a", "c")
    assert memory.longest([1] * BLOCK) == memory.longest([2] * BLOCK) == {"c": BLOCK}


def test_prefix_memory_of_a_device_that_left_without_an_heir() -> None:
    memory = PrefixMemory()
    memory.remember([1] * BLOCK, "a")
    memory.remember([2] * BLOCK, "b")
    memory.forget_others({"b"})
    memory.remember([3] * BLOCK, "a")
    assert memory.longest([1] * BLOCK) == {}
    assert memory.longest([2] * BLOCK) == {"b": BLOCK}
    assert memory.longest([3] * BLOCK) == {"a": BLOCK}


@given(st.lists(st.integers(0, 3), max_size=4 * BLOCK), st.lists(st.integers(0, 3), max_size=4 * BLOCK))
def test_prefix_memory(first: list[int], second: list[int]) -> None:
    memory = PrefixMemory()
    memory.remember(first, "a")
    common = next(
        (i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), min(len(first), len(second))
    )
    whole = common // BLOCK * BLOCK
    assert memory.longest(second) == ({"a": whole} if whole else {})


def test_prefix_memory_forgets() -> None:
    memory = PrefixMemory(capacity=2)
    memory.remember([1] * BLOCK, "a")
    memory.remember([2] * 2 * BLOCK, "b")
    assert memory.longest([1] * BLOCK) == {}
    assert memory.longest([2] * 2 * BLOCK) == {"b": 2 * BLOCK}
