"""I4 and I6: whatever happens to workers, whoever reads sees one undisturbed answer, and goes where the KV is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from concertina.orchestrator.ingress.choice import Choice, Piece
from concertina.orchestrator.ingress.completions import Completions
from concertina.orchestrator.ingress.fields import Fields
from concertina.orchestrator.ingress.generation import Generation
from concertina.orchestrator.ingress.members import Member, NoWorker
from concertina.orchestrator.ingress.prefixes import BLOCK
from concertina.orchestrator.ingress.router import Router
from concertina.orchestrator.ingress.tokenizer import Tokenizer
from concertina.workers.protocol import EngineOutput
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .fleet import Event, Fleet, events
from .test_router import ask, collect, reference, routed, run, tokens_of, until
from .toy import ToyWorker, connect_to

LONG = tuple(range(3, 3 + 2 * BLOCK))
EARLIER = tuple(range(4, 4 + 2 * BLOCK))
BODY: dict[str, Any] = {"model": "toy", "prompt": [[9, 8], [7]], "max_tokens": 12}


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(str(checkpoint))


class Books:
    """A watcher that adds up."""

    def __init__(self) -> None:
        self.tokens = 0
        self.open = 0

    def submitted(self) -> None:
        self.open += 1

    def progressed(self, tokens: int, gap_s: float | None) -> None:
        self.tokens += tokens

    def ended(self, had_tokens: bool) -> None:
        self.open -= 1


async def answer(router: Router, tokenizer: Tokenizer, body: dict[str, Any]) -> tuple[list[Piece], int]:
    """All choices' pieces, joined as clients join them, and the tokens counted."""
    job = await Completions().read(Fields(body), tokenizer, 200, 2)
    books = Books()
    generation = Generation("x", job, router, tokenizer, books)
    taken: dict[int, list[Piece]] = {choice.index: [] for choice in generation.choices}

    def take(choices: Sequence[Choice]) -> None:
        for choice in choices:
            taken[choice.index].append(choice.take())

    async for changed in generation.updates():
        if job.stream:
            take(changed)
    take(generation.choices)
    assert books.open == 0
    assert books.tokens >= generation.completion_tokens
    return [join(pieces) for _, pieces in sorted(taken.items())], generation.completion_tokens


def join(pieces: Sequence[Piece]) -> Piece:
    return Piece("".join(p.text for p in pieces), tuple(e for p in pieces for e in p.entries), pieces[-1].finish)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    happenings=st.lists(events, max_size=25),
    batch=st.integers(1, 3),
    sampling=st.sampled_from([{"temperature": 0}, {"seed": 5}]),
    stream=st.booleans(),
    n=st.integers(1, 3),
    stop_at=st.none() | st.integers(0, 6),
    logprobs=st.sampled_from([None, 1]),
)
def test_nobody_sees_what_happens_to_workers(
    tokenizer: Tokenizer,
    happenings: list[Event],
    batch: int,
    sampling: dict[str, int],
    stream: bool,
    n: int,
    stop_at: int | None,
    logprobs: int | None,
) -> None:
    """I4: any interleaving of kills, hand-overs, replacements and late news leaves the answer as it was."""
    body = {**BODY, **sampling, "n": n, "stream": stream, "logprobs": logprobs}

    async def main() -> None:
        calm = await routed([ToyWorker(batch=batch)])
        if stop_at is not None:
            (whole, *_), _ = await answer(calm, tokenizer, body)
            body["stop"] = whole.text[stop_at : stop_at + 2] or "x"
        expected = await answer(calm, tokenizer, body)
        await calm.close()
        fleet = Fleet(batch)
        suffering = asyncio.create_task(fleet.suffer(happenings))
        assert await answer(fleet.router, tokenizer, body) == expected
        await suffering
        assert all(lane.outstanding == lane.sequences == 0 for lane in fleet.router.lanes)
        await fleet.router.close()

    run(main())


def at(device: str, worker: ToyWorker, draining: bool = False) -> Member:
    return Member(worker.name, "toy", 1, device=device, draining=draining)


@pytest.mark.parametrize("after", [0, 5])
def test_moved_goes_to_the_heir(after: int) -> None:
    """At once, although others are free and the heir is busy; nothing of it is to be seen."""

    async def main() -> None:
        leaver, heir, free = ToyWorker("leaver"), ToyWorker("heir"), ToyWorker("free")
        router = Router(connect_to([leaver, heir, free]))
        router.update([at("d0", leaver)])
        await collect(router, ask(prompt=EARLIER))
        got: list[EngineOutput] = []
        leaver.step_s = 0.002
        task = asyncio.create_task(collect(router, ask(prompt=LONG), got))
        await until(lambda: len(leaver.requests) == 2 and len(got) >= after)
        leaver.gate.clear()
        router.update([at("d0", leaver, draining=True), at("d1", heir)])
        await until(lambda: all(lane.connected for lane in router.lanes))
        heir.gate.clear()
        busy = [asyncio.create_task(collect(router, ask(f"b{i}", max_tokens=500))) for i in range(2)]
        await until(lambda: len(heir.requests) == 2)
        router.update([at("d0", leaver, draining=True), at("d2", free), at("d1", heir)])
        await until(lambda: all(lane.connected for lane in router.lanes))
        leaver.hand_over("d1")
        await until(lambda: len(heir.requests) == 3)
        assert not free.requests
        assert heir.requests[-1].prompt == (*LONG, *tokens_of(got))
        heir.gate.set()
        assert tokens_of(await task) == reference(ask(prompt=LONG))
        assert {o.finish_reason for o in got[:-1]} == {None}
        assert {o.moved_to for o in got} == {""}
        await asyncio.gather(*busy)
        router.update([at("d1", heir), Member("free", "toy", 1, device="d2", speed=1.5)])
        await collect(router, ask(prompt=[*EARLIER, 1]))
        assert not free.requests, "its prefixes are the heir's"
        await router.close()

    run(main())


def test_moved_waits_a_little_for_the_heir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concertina.orchestrator.ingress.router.CONNECT_S", 0.1)

    async def main() -> None:
        leaver, heir, other = ToyWorker("leaver"), ToyWorker("heir", down=True), ToyWorker("other")
        router = Router(connect_to([leaver, heir, other]))
        router.update([at("d0", leaver)])
        leaver.gate.clear()
        tasks = [asyncio.create_task(collect(router, ask()))]
        await until(lambda: leaver.requests)
        router.update([at("d0", leaver, draining=True), at("d1", heir), at("d2", other)])
        await until(lambda: router.ready and sum(lane.connected for lane in router.lanes) == 2)
        leaver.hand_over("d1")
        await asyncio.sleep(0.03)
        assert not other.requests
        await until(lambda: other.requests)
        assert tokens_of(await tasks[0]) == reference(ask())
        await router.close()

    run(main())


@pytest.mark.parametrize("heir", ["", "unknown"])
def test_moved_to_nobody_known(heir: str) -> None:
    async def main() -> None:
        leaver, other = ToyWorker("leaver"), ToyWorker("other")
        router = Router(connect_to([leaver, other]))
        router.update([at("d0", leaver)])
        leaver.gate.clear()
        task = asyncio.create_task(collect(router, ask()))
        await until(lambda: leaver.requests)
        router.update([at("d0", leaver, draining=True), at("d1", other)])
        leaver.hand_over(heir)
        assert tokens_of(await task) == reference(ask())
        assert len(other.requests) == 1
        await router.close()

    run(main())


def test_moved_is_no_failure_however_often() -> None:
    async def main() -> None:
        workers = [ToyWorker(f"w{i}", device=f"d{i}") for i in range(40)]
        router = await routed(workers)
        for worker, heir in pairwise(workers):
            worker.hand_over(heir.device)
        assert tokens_of(await collect(router, ask())) == reference(ask())
        await router.close()

    run(main())


def test_hand_over_heard_although_the_list_came_first() -> None:
    """A worker may be off the list before what it says of its sequences arrives."""

    async def main() -> None:
        leaver, heir, other = ToyWorker("leaver"), ToyWorker("heir"), ToyWorker("other")
        router = Router(connect_to([leaver, heir, other]))
        router.update([at("d0", leaver)])
        leaver.gate.clear()
        task = asyncio.create_task(collect(router, ask()))
        await until(lambda: leaver.requests)
        router.update([at("d2", other), at("d1", heir)])
        await until(lambda: sum(lane.connected for lane in router.lanes) == 2)
        leaver.hand_over("d1")
        assert tokens_of(await task) == reference(ask())
        assert len(heir.requests) == 1
        await router.close()

    run(main())


def test_a_killed_workers_sequences_wait_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anybody has noticed, and while it is replaced, idle as the other worker is; new requests do not wait."""
    monkeypatch.setattr("concertina.orchestrator.ingress.router.CONNECT_S", 0.0)

    async def main() -> None:
        dead, other, new = ToyWorker("dead", die_after=5), ToyWorker("other"), ToyWorker("new")
        router = Router(connect_to([dead, other, new]), recovery_timeout_s=15)
        router.update([at("d0", dead)])
        task = asyncio.create_task(collect(router, ask()))
        await until(lambda: dead.down)
        router.update([at("d0", dead), at("d1", other)])
        await until(lambda: any(lane.connected for lane in router.lanes))
        await asyncio.sleep(0.02)
        assert not other.requests
        router.update([at("d1", other)], {"d0"})
        await collect(router, ask("fresh"))
        assert len(other.requests) == 1
        monkeypatch.setattr("concertina.orchestrator.ingress.router.CONNECT_S", 2.0)
        router.update([at("d1", other), at("d0", new)])
        assert tokens_of(await task) == reference(ask())
        assert (len(other.requests), len(new.requests)) == (1, 1)
        assert new.requests[0].prompt == (*ask().prompt, *reference(ask())[:5])
        await router.close()

    run(main())


def test_a_device_that_nobody_awaits_any_more() -> None:
    async def main() -> None:
        dead, other = ToyWorker("dead", die_after=5), ToyWorker("other")
        router = Router(connect_to([dead, other]), recovery_timeout_s=15)
        router.update([at("d0", dead)])
        task = asyncio.create_task(collect(router, ask()))
        await until(lambda: dead.down)
        router.update([at("d1", other)], {"d0"})
        await until(lambda: any(lane.connected for lane in router.lanes))
        await asyncio.sleep(0.02)
        assert not other.requests
        router.update([at("d1", other)])
        assert tokens_of(await task) == reference(ask())
        await router.close()

    run(main())


def test_a_leaver_that_dies_has_an_heir() -> None:
    """Its sequences wait until another device has its KV, and go on there, although others are free."""

    async def main() -> None:
        leaver, free, heir = ToyWorker("leaver", die_after=5), ToyWorker("free"), ToyWorker("heir")
        router = Router(connect_to([leaver, free, heir]), recovery_timeout_s=15)
        router.update([at("d0", leaver)])
        task = asyncio.create_task(collect(router, ask()))
        await until(lambda: leaver.down)
        both = [at("d1", free), at("d2", heir)]
        router.update(both, {"d0"})
        await until(lambda: all(lane.connected for lane in router.lanes))
        await asyncio.sleep(0.02)
        assert not free.requests + heir.requests
        router.update(both, frozenset(), {"d0": "d2"})
        assert tokens_of(await task) == reference(ask())
        assert (len(free.requests), len(heir.requests)) == (0, 1)
        await router.close()

    run(main())


def test_waiting_for_a_device_has_an_end() -> None:
    """Then any worker will do."""

    async def main() -> None:
        dead, other = ToyWorker("dead", die_after=5), ToyWorker("other")
        router = Router(connect_to([dead, other]), recovery_timeout_s=0.1)
        router.update([at("d0", dead)])
        task = asyncio.create_task(collect(router, ask()))
        await until(lambda: dead.down)
        router.update([at("d1", other)], {"d0"})
        assert tokens_of(await task) == reference(ask())
        assert len(other.requests) == 1
        await router.close()

    run(main())


def test_new_requests_prefer_devices_that_are_not_awaited() -> None:
    async def main() -> None:
        sick, well = ToyWorker("sick"), ToyWorker("well")
        router = Router(connect_to([sick, well]))
        router.update([at("d0", sick), Member("well", "toy", 1, device="d1", speed=1e-6)], {"d0"})
        await until(lambda: all(lane.connected for lane in router.lanes))
        await collect(router, ask())
        assert (len(sick.requests), len(well.requests)) == (0, 1)
        router.update([at("d0", sick)], {"d0"})
        await collect(router, ask())
        assert len(sick.requests) == 1, "better than nobody"
        await router.close()

    run(main())


def test_new_requests_queue_and_health_holds_while_somebody_is_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concertina.orchestrator.ingress.lanes.GRACE_S", 0.05)

    async def main() -> None:
        first, second = ToyWorker("first"), ToyWorker("second")
        router = Router(connect_to([first, second]), worker_wait_s=0.01, recovery_timeout_s=15)
        assert not router.ready
        router.update([at("d0", first)])
        assert not router.ready, "it was never connected"
        await until(lambda: router.ready)
        router.update([], {"d0"})
        task = asyncio.create_task(collect(router, ask()))
        await asyncio.sleep(0.1)
        assert router.ready
        assert not task.done()
        router.update([at("d0", second)])
        assert tokens_of(await task) == reference(ask())
        second.down = True
        assert router.ready, "only for a moment yet"
        await asyncio.sleep(0.1)
        assert not router.ready
        with pytest.raises(NoWorker):
            await collect(router, ask())
        await router.close()

    run(main())
