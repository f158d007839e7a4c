"""The controller's shell over hands in memory: it starts, shows what it is doing, and fails with the reason."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from concertina.errors import InternalError, OperatorError
from concertina.orchestrator import controller as module
from concertina.orchestrator import under_way
from concertina.orchestrator.balancer import Balancer
from concertina.orchestrator.config import DeploymentConfig, EndpointOptions, EngineOptions
from concertina.orchestrator.controller import Controller
from concertina.orchestrator.hands import NodeInfo

from ..checkpoints import make_checkpoint
from .fake_hands import FakeHands

LIMIT_S = 10.0
HERE, THERE = NodeInfo("here", "127.0.0.1", 4, 1 << 30), NodeInfo("there", "10.0.0.2", 4, 1 << 30)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))


@asynccontextmanager
async def controlled(config: DeploymentConfig, hands: FakeHands) -> AsyncIterator[Controller]:
    controller = Controller(config, hands)
    try:
        await asyncio.wait_for(controller.start(), LIMIT_S)
        yield controller
    finally:
        await controller.stop()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0.01)


def failure_of(controller: Controller) -> str:
    try:
        controller.check()
    except InternalError as e:
        return str(e)
    return ""


def test_from_nothing_to_serving(checkpoint: Path) -> None:
    async def go() -> None:
        hands = FakeHands(HERE)
        endpoint = EndpointOptions(port=81)
        config = DeploymentConfig(
            str(checkpoint), 3, standbys=0, endpoint=endpoint, engine=EngineOptions(max_running=5)
        )
        async with controlled(config, hands) as controller:
            controller.check()
            assert [(a.host, a.port) for a in (await controller.members()).workers] == [
                ("127.0.0.1", 9000 + i) for i in range(3)
            ]
            (owner,) = hands.owners
            assert {w.config.scheduler.max_running for w in hands.workers} == {5}
            assert {w.config.threads for w in hands.workers} == {1}
            for rank, worker in enumerate(hands.workers):
                assignment = worker.prepared[1]
                assert assignment.rank == rank
                assert assignment.device.pages == owner.extents
                assert assignment.device.token == config.token == worker.config.token
                assert assignment.generation.exchange.kind == "shared"
            status = await controller.status()
            assert (status.phase, status.generation, status.experts) == ("serving", 1, 5)
            assert status.endpoint == "http://127.0.0.1:81"
            assert all(sum(w.experts_per_layer[i] for w in status.workers) >= 5 for i in range(3))
            (pool,) = status.pools
            assert sum(pool.by_purpose.values()) == pool.pages
            progress = await controller.progress()
            assert progress.loaded_bytes == progress.total_bytes > 0
        assert all(w.stopped for w in hands.workers)

    asyncio.run(go())


@pytest.mark.parametrize("emulated_step_ms", [0.0, 15.0])
def test_workers_are_told_of_emulated_steps_and_everybody_else_too(
    checkpoint: Path, emulated_step_ms: float, caplog: pytest.LogCaptureFixture
) -> None:
    async def go() -> None:
        hands = FakeHands(HERE)
        config = DeploymentConfig(str(checkpoint), 2, engine=EngineOptions(emulated_step_ms=emulated_step_ms))
        async with controlled(config, hands) as controller:
            await until(lambda: len(hands.workers) == 3)  # with a standby
            assert {w.config.emulated_step_ms for w in hands.workers} == {emulated_step_ms}
            assert (await controller.status()).emulated_step_ms == emulated_step_ms
        assert ("step times are emulated: at least 15 ms" in caplog.text) == bool(emulated_step_ms)

    asyncio.run(go())


def test_two_nodes_have_an_owner_each_and_meet_at_a_store(checkpoint: Path) -> None:
    async def go() -> None:
        hands = FakeHands(HERE, THERE)
        async with controlled(DeploymentConfig(str(checkpoint), 2, standbys=0), hands) as controller:
            assert len(hands.owners) == 2
            assert [a.host for a in (await controller.members()).workers] == ["127.0.0.1", "10.0.0.2"]
            exchanges = {w.prepared[1].generation.exchange for w in hands.workers}
            assert {(e.kind, e.store_host, e.store_port) for e in exchanges} == {("gloo", "10.0.0.1", 5555)}
            for rank, worker in enumerate(hands.workers):
                assert worker.prepared[1].device.address == f"@{hands.owners[rank].config_.name}"

    asyncio.run(go())


@pytest.mark.parametrize("call", ["start_owner", "start_worker", "fill", "prepare", "commit", "open_store"])
@pytest.mark.parametrize(("error", "tries"), [(OperatorError("the disk burns"), 1), (InternalError("it broke"), 3)])
def test_a_failed_step_ends_the_start_with_its_reason(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception, tries: int
) -> None:
    """What a second try cannot help is not tried again; other faults are, three times."""
    monkeypatch.setattr(module, "_TICK_S", 0.1)
    monkeypatch.setattr(under_way, "_BACK_OFF_S", 0.02)

    async def go() -> None:
        hands = FakeHands(HERE)
        hands.faults.errors[call] = error
        controller = Controller(DeploymentConfig(str(checkpoint), 2, standbys=0, exchange="gloo"), hands)
        with pytest.raises(InternalError, match=str(error)):
            await asyncio.wait_for(controller.start(), LIMIT_S)
        assert (await controller.members()).workers == ()
        status = await controller.status()
        assert (status.phase, status.detail) == ("failed", str(error))
        assert hands.faults.calls.count(call) <= 2 * tries
        calls = len(hands.faults.calls)
        await asyncio.sleep(0.3)  # ticks later nothing was tried again
        assert len(hands.faults.calls) == calls
        await controller.stop()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("fields", "nodes", "says"),
    [
        ({"device_memory_bytes": 1 << 16}, [HERE], "device-memory"),
        ({"placement_file": "/nowhere.json"}, [HERE], "/nowhere.json"),
        ({"engine": EngineOptions(max_model_len=2000)}, [HERE], "max-model-len: 2000"),
        ({"workers": 2, "exchange": "shared"}, [HERE, THERE], "exchange: shared memory"),
        ({}, [], "no node is alive"),
    ],
)
def test_what_cannot_be_starts_nothing(
    checkpoint: Path, fields: dict[str, Any], nodes: list[NodeInfo], says: str
) -> None:
    async def go() -> None:
        hands = FakeHands(*nodes)
        controller = Controller(DeploymentConfig(str(checkpoint), **fields), hands)
        with pytest.raises(OperatorError, match=re.escape(says)):
            await controller.start()
        await controller.stop()
        assert hands.faults.calls == []

    asyncio.run(go())


@pytest.mark.parametrize("call", ["start_owner", "start_worker", "fill", "prepare", "commit"])
def test_a_surprise_in_an_effect_is_a_failure_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Any exception, not only ours: else the effect would be asked for again and again, silently."""
    monkeypatch.setattr(under_way, "_BACK_OFF_S", 0.02)

    async def go() -> None:
        hands = FakeHands(HERE)
        hands.faults.errors[call] = ValueError("surprise")
        with pytest.raises(InternalError, match="ValueError: surprise"):
            async with controlled(DeploymentConfig(str(checkpoint), 2, standbys=0), hands):
                pytest.fail("it serves")
        assert hands.faults.calls.count(call) <= 6

    asyncio.run(go())


def test_a_surprise_in_the_loop_is_a_failure_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that ends must not leave a deployment that looks well."""

    async def go() -> None:
        hands = FakeHands(HERE)
        async with controlled(DeploymentConfig(str(checkpoint), 2, standbys=0), hands) as controller:

            async def broken(*, anew: bool = False) -> None:
                raise ValueError("surprise")

            monkeypatch.setattr(hands, "nodes", broken)
            await until(lambda: bool(failure_of(controller)))
            assert "ValueError: surprise" in failure_of(controller)
            assert (await controller.members()).workers == ()

    asyncio.run(go())


def test_a_loads_file_that_cannot_be_written_does_not_stop_serving(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    async def go() -> None:
        hands = FakeHands(HERE)
        config = DeploymentConfig(
            str(checkpoint), 2, standbys=0, rebalance_s=1e-6, loads_file=str(tmp_path / "no" / "loads.json")
        )
        async with controlled(config, hands) as controller:
            monkeypatch.setattr(Balancer, "due", property(lambda self: True))
            await until(lambda: "cannot be written" in caplog.text)
            await asyncio.sleep(0.05)
            controller.check()
            assert len((await controller.members()).workers) == 2

    asyncio.run(go())
