"""What the controller learns of its processes, and when it is woken."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast

from concertina.orchestrator.cluster import Cluster
from concertina.orchestrator.core.facts import (
    Abandon,
    Commit,
    Effect,
    Fill,
    Free,
    HandOver,
    Prepare,
    ResizeKV,
    StopWorker,
)
from concertina.orchestrator.hands import NodeInfo
from concertina.workers.engine.scheduler import SchedulerConfig
from concertina.workers.owner_roles import OwnerConfig, OwnerReport
from concertina.workers.roles import WorkerConfig, WorkerReport

from .fake_hands import FakeHands, FakeOwner, FakeWorker

HERE = NodeInfo("here", "127.0.0.1", 4, 1 << 30)


class Teller(FakeWorker):
    """Its watch tells when the test wants it to."""

    telling: asyncio.Event

    async def watch(self, seen: WorkerReport, timeout_s: float) -> WorkerReport:
        await self.telling.wait()
        self.telling.clear()
        return await self.report()


def test_news_wakes_unless_it_was_decided_on_already() -> None:
    async def go() -> None:
        hands, woken = FakeHands(HERE), list[None]()
        cluster = Cluster(cast(Any, hands), 20.0, lambda: woken.append(None))
        config = WorkerConfig("worker-0", "127.0.0.1", "t" * 16, 1, cast(SchedulerConfig, None))
        worker = Teller(config, hands.faults, 0)
        worker.telling = asyncio.Event()

        async def told() -> int:
            worker.telling.set()
            await asyncio.sleep(0.05)
            return len(woken)

        await cluster.look_at_nodes()
        await cluster.add_worker("worker-0", "here", cast(Any, worker))
        try:
            await asyncio.sleep(0)
            worker.ready.add(1)
            assert await told() == 1
            assert await told() == 1  # no news
            worker.ready.add(2)
            cluster.touch(ResizeKV("worker-0", 1))
            snapshot = await cluster.look(frozenset(), {})
            assert snapshot.workers["worker-0"].prepared == {1, 2}
            assert await told() == 1
            worker.ready.add(3)
            await cluster.ask()  # somebody else has seen it, and decided nothing
            assert await told() == 2
        finally:
            cluster.close()

    asyncio.run(go())


class Asked(FakeHands):
    """Knows who was asked, and keeps its own time."""

    def __init__(self, *nodes: NodeInfo) -> None:
        super().__init__(*nodes)
        self.time_s = 100.0
        self.asked: list[str] = []

    def now_s(self) -> float:
        return self.time_s

    def noting(self, name: str, process: Any) -> Any:
        """``process``, with its name noted each time that it reports."""
        report = process.report

        async def noted(*seen: int) -> object:
            self.asked.append(name)
            return await report(*seen)

        process.report = noted
        return process


WORKER_CONFIG = WorkerConfig("worker-0", "127.0.0.1", "t" * 16, 1, cast(SchedulerConfig, None))
EVERYBODY = ["pool-0", "pool-1", "worker-0", "worker-1"]


def test_only_those_are_asked_who_may_have_something_new_to_say() -> None:
    """A word stands for a moment, unless something was done to who gave it, or it has news."""
    done: list[tuple[Effect, list[str]]] = [
        (Prepare("worker-1", 2), []),  # it has said what came of it
        (Commit("worker-0", 2), []),
        (Abandon("worker-1", 2), []),
        (Fill("pool-0", ()), []),
        (Free("pool-1", ("expert/0/0",)), []),
        (ResizeKV("worker-0", 4), EVERYBODY),  # its pool too
        (HandOver("cpu-1", "pool-0", "worker-0"), EVERYBODY),
        (StopWorker("worker-9"), EVERYBODY),
    ]

    async def go() -> None:
        hands = Asked(HERE)
        cluster = Cluster(cast(Any, hands), 20.0, lambda: None)
        workers = [Teller(replace(WORKER_CONFIG, name=f"worker-{n}"), hands.faults, n) for n in range(2)]

        async def asked() -> list[str]:
            hands.asked.clear()
            await cluster.look(frozenset(), {})
            return sorted(hands.asked)

        await cluster.look_at_nodes()
        for n, worker in enumerate(workers):
            worker.telling = asyncio.Event()
            owner = FakeOwner(OwnerConfig(f"pool-{n}", 16, 65536, "t" * 16), hands.faults)
            await cluster.add_worker(f"worker-{n}", "here", hands.noting(f"worker-{n}", worker))
            await cluster.add_pool(f"pool-{n}", "here", hands.noting(f"pool-{n}", owner))
        try:
            await asyncio.sleep(0)
            assert await asked() == EVERYBODY
            hands.time_s += 0.05
            assert await asked() == []
            for effect, told in done:
                hands.time_s += 0.001
                cluster.touch(effect)
                hands.time_s += 0.001
                assert await asked() == told, effect
                assert await asked() == [], effect
            hands.time_s += 0.001
            cluster.touch(Fill("pool-0", ()), failed=True)  # by whoever's fault
            hands.time_s += 0.001
            assert await asked() == EVERYBODY
            workers[1].ready.add(1)
            workers[1].telling.set()
            await asyncio.sleep(0.05)
            hands.time_s += 0.001
            assert await asked() == []
            assert cluster.workers["worker-1"].report.prepared == {1}
            hands.asked.clear()
            await cluster.ask()  # whoever wants to know exactly
            assert sorted(hands.asked) == EVERYBODY
            hands.time_s += 0.2
            assert await asked() == EVERYBODY
        finally:
            cluster.close()

    asyncio.run(go())


def test_what_was_done_after_the_question_makes_its_answer_old() -> None:
    async def go() -> None:
        hands = Asked(HERE)
        cluster = Cluster(cast(Any, hands), 20.0, lambda: None)
        worker = Teller(WORKER_CONFIG, hands.faults, 0)
        worker.telling = asyncio.Event()
        await cluster.look_at_nodes()
        await cluster.add_worker("worker-0", "here", cast(Any, worker))
        try:
            worker.hangs = True  # for as long as the question is under way
            looking = asyncio.create_task(cluster.look(frozenset(), {}))
            await asyncio.sleep(0.02)
            hands.time_s += 0.001
            worker.ready.add(7)
            cluster.touch(ResizeKV("worker-0", 7))
            worker.hangs = False
            await looking
            worker.ready.add(8)
            hands.time_s += 0.001
            assert (await cluster.look(frozenset(), {})).workers["worker-0"].prepared == {7, 8}
        finally:
            cluster.close()

    asyncio.run(go())


def test_the_latest_report_counts_and_is_as_old_as_its_question() -> None:
    async def go() -> None:
        hands = Asked(HERE)
        cluster = Cluster(cast(Any, hands), 20.0, lambda: None)
        worker = Teller(WORKER_CONFIG, hands.faults, 0)
        worker.telling = asyncio.Event()
        await cluster.look_at_nodes()
        member = await cluster.add_worker("worker-0", "here", hands.noting("worker-0", worker))
        try:
            before = await worker.report()
            worker.ready.add(7)
            after = await worker.report()
            member.hear(after, 100.0, 100.01)
            member.hear(before, 100.005, 100.02)  # made earlier, though it came later
            assert member.report.prepared == {7}
            hands.time_s = 100.03
            hands.asked.clear()
            await cluster.look(frozenset(), {})
            assert hands.asked == []
            cluster.touch(ResizeKV("worker-0", 4))  # ends now, and began before this:
            member.hear(await worker.report(), 100.025, 100.04)
            hands.time_s = 100.05
            hands.asked.clear()
            await cluster.look(frozenset(), {})
            assert hands.asked == ["worker-0"]
        finally:
            cluster.close()

    asyncio.run(go())


class Late(FakeWorker):
    """Its answers come when the test wants them."""

    answers: asyncio.Event

    async def report(self) -> WorkerReport:
        await self.answers.wait()
        return await super().report()


def test_an_answer_that_was_not_waited_for_wakes() -> None:
    """A decision was made without it, and the next one would ask anew."""

    async def go() -> None:
        hands, woken = FakeHands(HERE), list[None]()
        cluster = Cluster(cast(Any, hands), 20.0, lambda: woken.append(None))
        worker = Late(WORKER_CONFIG, hands.faults, 0)
        worker.answers = asyncio.Event()
        worker.answers.set()
        await cluster.look_at_nodes()
        await cluster.add_worker("worker-0", "here", cast(Any, worker))
        try:
            worker.answers.clear()
            cluster.touch(ResizeKV("worker-0", 4))
            await cluster.look(frozenset(), {})
            before = len(woken)
            await asyncio.sleep(0.05)
            worker.answers.set()
            await asyncio.sleep(0.05)
            assert len(woken) == before + 1
        finally:
            cluster.close()

    asyncio.run(go())


class Silent(FakeOwner):
    """Whoever waits for its end learns of it late."""

    async def wait(self, timeout_s: float) -> None:
        await asyncio.sleep(timeout_s)


def test_an_owner_that_is_asked_and_has_died_is_known_to_be_lost_at_once() -> None:
    """What was tried on it would fail again and again, in less time than its watch takes."""

    async def go() -> None:
        hands, woken = FakeHands(HERE), list[None]()
        cluster = Cluster(cast(Any, hands), 20.0, lambda: woken.append(None))
        owner = Silent(OwnerConfig("pool", 16, 65536, "t" * 16), hands.faults)
        await cluster.look_at_nodes()
        await cluster.add_pool("pool", "here", cast(Any, owner))
        try:
            assert set((await cluster.look(frozenset(), {})).pools) == {"pool"}
            owner.dead = True
            cluster.touch(Fill("pool", ()), failed=True)
            assert not (await cluster.look(frozenset(), {})).pools
            assert woken
        finally:
            cluster.close()

    asyncio.run(go())


class Overtaken(FakeOwner):
    """Its answers come in another order than they were asked for."""

    def say(self, *reports: OwnerReport) -> None:
        self.reports = list(reports)

    async def report(self, seen: int = -1) -> OwnerReport:
        return self.reports.pop(0)


def test_an_owner_that_owes_an_answer_since_a_change_is_stale() -> None:
    """Its pages of before may have been freed; one that is merely slow is taken at its word once."""

    async def go() -> None:
        hands = FakeHands(HERE)
        cluster = Cluster(cast(Any, hands), 20.0, lambda: None)
        owner = Slow(OwnerConfig("pool", 16, 65536, "t" * 16), hands.faults)
        await cluster.look_at_nodes()
        await cluster.add_pool("pool", "here", cast(Any, owner))
        try:
            assert not await stale(cluster)
            await asyncio.sleep(0.15)
            owner.answers.clear()
            assert not await stale(cluster)
            owner.answers.set()
            await asyncio.sleep(0.15)
            assert not await stale(cluster)
            owner.answers.clear()
            cluster.touch(ResizeKV("worker-0", 3))
            assert await stale(cluster)
            owner.answers.set()
            assert not await stale(cluster)
        finally:
            cluster.close()

    asyncio.run(go())


async def stale(cluster: Cluster) -> bool:
    return (await cluster.look(frozenset(), {})).pools["pool"].stale


class Slow(FakeOwner):
    """It answers when it may."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.answers = asyncio.Event()
        self.answers.set()

    async def report(self, seen: int = -1) -> OwnerReport:
        await self.answers.wait()
        return await super().report(seen)


def test_an_answer_that_was_overtaken_does_not_undo_the_later_one() -> None:
    async def go() -> None:
        hands = FakeHands(HERE)
        cluster = Cluster(cast(Any, hands), 20.0, lambda: None)
        owner = Overtaken(OwnerConfig("pool", 16, 65536, "t" * 16), hands.faults)
        new, old = {"kv/a": (1, 2)}, {"kv/a": (1,)}
        owner.say(
            OwnerReport(3, old, 10, 0),
            OwnerReport(5, new, 20, 1),
            OwnerReport(4, old, 10, 0),
            OwnerReport(5, None, 20, 2),
        )
        try:
            pool = await cluster.add_pool("pool", "here", cast(Any, owner))
            seen = [(pool.pages, cluster.moved_bytes)]
            for _ in range(3):
                await pool.refresh()
                seen.append((pool.pages, cluster.moved_bytes))
            assert seen == [(old, 10), (new, 21), (new, 21), (new, 22)]
            await cluster.look_at_nodes()  # its node is not among them
            assert cluster.moved_bytes == 22, "what came before it was lost has come all the same"
        finally:
            cluster.close()

    asyncio.run(go())
