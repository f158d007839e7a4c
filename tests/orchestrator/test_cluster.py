"""What the controller learns of its processes, and when it is woken."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from concertina.orchestrator.cluster import Cluster
from concertina.orchestrator.hands import NodeInfo
from concertina.workers.engine.scheduler import SchedulerConfig
from concertina.workers.owner import OwnerConfig, OwnerReport
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
            snapshot = await cluster.look(frozenset(), {})
            assert snapshot.workers["worker-0"].prepared == {1, 2}
            assert await told() == 1
            worker.ready.add(3)
            await cluster.ask()  # somebody else has seen it, and decided nothing
            assert await told() == 2
        finally:
            cluster.close()

    asyncio.run(go())


class Overtaken(FakeOwner):
    """Its answers come in another order than they were asked for."""

    def say(self, *reports: OwnerReport) -> None:
        self.reports = list(reports)

    async def report(self, seen: int = -1) -> OwnerReport:
        return self.reports.pop(0)


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
                await cluster.refresh("pool")
                seen.append((pool.pages, cluster.moved_bytes))
            assert seen == [(old, 10), (new, 21), (new, 21), (new, 22)]
        finally:
            cluster.close()

    asyncio.run(go())
