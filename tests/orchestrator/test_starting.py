"""Processes that hang while they start: they are ended, and whatever needed them is tried again or undone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
from concertina.errors import InternalError
from concertina.orchestrator.starting import started

from ..checkpoints import make_checkpoint
from .fake_hands import FakeHands
from .test_elastic_controller import HERE, controlled, devices, done, until

START_S = 0.2
OWNER = "concertina/device/here/cpu-1"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))


def test_who_answers_is_left_alone_and_who_fails_says_why() -> None:
    async def failing() -> None:
        raise InternalError("no process was started")

    async def go() -> None:
        hands = FakeHands(HERE)
        await started(cast(Any, hands), "worker-0", "worker-0", START_S, asyncio.sleep(0.0))
        assert not hands.killed
        with pytest.raises(InternalError, match=r"^no process was started$"):
            await started(cast(Any, hands), "worker-0", "worker-0", START_S, failing())
        assert not hands.killed

    asyncio.run(go())


def test_who_gives_no_answer_is_killed_and_named() -> None:
    async def go() -> list[str]:
        hands = FakeHands(HERE)
        says = r"^worker-0 on node here was started and gave no answer for 0\.2 s; it was killed$"
        with pytest.raises(InternalError, match=says):
            await started(cast(Any, hands), "worker-0 on node here", "worker-0", START_S, asyncio.sleep(1e6))
        return hands.killed

    assert asyncio.run(go()) == ["worker-0"]


def test_who_has_no_process_yet_is_waited_for() -> None:
    """The cluster may have no room for it now."""

    async def go() -> None:
        hands, answer = FakeHands(HERE), asyncio.Event()
        hands.placed = False

        async def answering() -> None:
            await answer.wait()

        waiting = asyncio.create_task(started(cast(Any, hands), "worker-0", "worker-0", START_S, answering()))
        await until(lambda: hands.looks > 12)
        assert not waiting.done()
        answer.set()
        await waiting
        assert not hands.killed

    asyncio.run(go())


def test_whoever_stops_waiting_stops_asking() -> None:
    async def go() -> bool:
        asking = asyncio.Event()

        async def answering() -> None:
            try:
                await asyncio.sleep(1e6)
            finally:
                asking.set()

        waiting = asyncio.create_task(started(cast(Any, FakeHands(HERE)), "", "worker-0", 1e6, answering()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.sleep(0)
        return asking.is_set()

    assert asyncio.run(go())


@pytest.mark.parametrize(
    ("call", "mode", "says"),
    [
        ("start_worker", "shared", "worker-3 on node here was started and gave no answer for 0.2 s; it was killed"),
        (
            "start_owner",
            "separate",
            "memory owner device/here/cpu-1 on node here was started and gave no answer for 0.2 s; it was killed",
        ),
    ],
)
def test_an_operation_whose_processes_hang_while_they_start_fails(
    checkpoint: Path, call: str, mode: str, says: str
) -> None:
    """After its attempts; what serves goes on, and the next operation has its way."""

    async def go() -> None:
        async with controlled(checkpoint, 1, start_timeout_s=START_S, memory_mode=mode) as (controller, hands, token):
            hands.faults.held.add(call)
            ended = await done(controller, token, await controller.scale(token, 2))
            assert (ended.state, ended.reason) == ("failed", says)
            started_three_times = {"start_worker": {"worker-1", "worker-2", "worker-3"}, "start_owner": {OWNER}}[call]
            assert started_three_times <= set(hands.killed)
            assert await devices(controller) == ["cpu-0"]
            hands.faults.held.clear()
            assert (await done(controller, token, await controller.scale(token, 2))).state == "done"

    asyncio.run(go())


def test_one_that_hangs_while_it_starts_is_replaced(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 1, start_timeout_s=START_S) as (controller, hands, token):
            hands.faults.held.add("start_worker")
            operation = await controller.scale(token, 2)
            await until(lambda: hands.killed)
            hands.faults.held.clear()
            assert (await done(controller, token, operation)).state == "done"

    asyncio.run(go())


def test_one_for_whom_there_is_no_room_yet_keeps_its_operation_waiting(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 1, start_timeout_s=START_S) as (controller, hands, token):
            hands.placed = False
            hands.faults.held.add("start_worker")
            operation = await controller.scale(token, 2)
            await until(lambda: hands.looks > 12)
            assert (await controller.operation(token, operation.id)).state == "running"
            assert not hands.killed
            hands.faults.held.clear()
            assert (await done(controller, token, operation)).state == "done"

    asyncio.run(go())


def test_one_for_whom_there_never_is_room_fails_its_operation(checkpoint: Path) -> None:
    """At once, without another attempt; the deployment serves on, and the next operation has its way."""

    async def go() -> None:
        async with controlled(checkpoint, 1, start_timeout_s=START_S / 10) as (controller, hands, token):
            hands.placed = False
            hands.faults.held.add("start_worker")
            ended = await done(controller, token, await controller.scale(token, 2))
            assert ended.state == "failed"
            assert ended.reason.startswith("cluster: no process came for worker-1 on node here in 0.1 s")
            assert set(hands.killed) == {"worker-1"}
            assert await devices(controller) == ["cpu-0"]
            hands.placed = True
            hands.faults.held.clear()
            assert (await done(controller, token, await controller.scale(token, 2))).state == "done"

    asyncio.run(go())


def test_a_standby_that_hangs_while_it_prepares_is_killed_and_replaced(checkpoint: Path) -> None:
    """It has answered once: it is found as any worker that hangs."""

    async def go() -> None:
        async with controlled(checkpoint, 1, standbys=1, hang_timeout_s=0.2) as (controller, hands, token):
            await until(lambda: len(hands.workers) == 2 and len(controller._cluster.workers) == 2)
            standby = hands.workers[1]
            hands.faults.held.add("prepare")
            operation = await controller.scale(token, 2)
            await until(lambda: hands.faults.calls.count("prepare") >= 2)
            standby.hangs = True
            hands.faults.held.clear()
            assert (await done(controller, token, operation)).state == "done"
            assert standby.dead
            assert await devices(controller) == ["cpu-0", "cpu-1"]

    asyncio.run(go())
