"""The controller's shell over hands in memory: who cannot be reached, what fails repeatedly, what comes between."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from concertina.errors import InternalError, OperatorError, Unreachable
from concertina.orchestrator import knocking, under_way
from concertina.orchestrator.config import DeploymentConfig
from concertina.orchestrator.controller import Controller
from concertina.orchestrator.deeds import Deeds
from concertina.orchestrator.knocking import Knocking

from ..checkpoints import make_checkpoint
from .fake_hands import FakeHands
from .test_elastic_controller import (
    HERE,
    LIMIT_S,
    THERE,
    controlled,
    devices,
    done,
    restarted,
    resumed,
    serving,
    until,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))


def test_a_worker_that_cannot_be_reached_is_ended_before_another_takes_its_device(checkpoint: Path) -> None:
    """It may live, and write the KV that its successor maps."""

    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, hands, token):
            lost = hands.workers[1]
            hands.faults.held.add("kill")
            lost.unreachable = True
            await until(lambda: len(hands.workers) == 3)
            await asyncio.sleep(0.1)
            assert not hands.workers[2].prepared
            hands.faults.held.clear()
            await until(lambda: lost.dead)
            hands.workers[0].parked = "PeerLost"
            await until(lambda: len(serving(hands)) == 2)
            assert serving(hands)[1].device == "cpu-1"
            assert (await done(controller, token, await controller.scale(token, 3))).state == "done"

    asyncio.run(go())


def test_who_was_out_of_reach_is_ended_though_it_is_heard_again(checkpoint: Path) -> None:
    """Others may have been told that it is lost."""

    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, hands, token):
            lost = hands.workers[1]
            hands.faults.errors["kill"] = InternalError("its node does not answer")
            lost.unreachable = True
            await until(lambda: "kill" in hands.faults.calls)
            lost.unreachable = False
            await until(lambda: hands.faults.calls.count("kill") == 2)
            del hands.faults.errors["kill"]
            await until(lambda: lost.dead)
            hands.workers[0].parked = "PeerLost"
            assert (await done(controller, token, await controller.scale(token, 3))).state == "done"

    asyncio.run(go())


def test_an_owner_that_cannot_be_reached_is_ended_and_another_one_adopts(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, hands, token):
            held = dict(hands.owners[0].extents)
            hands.owners[0].unreachable = True
            await until(lambda: len(hands.owners) == 2 and "node/here" in controller._cluster.pools)
            assert hands.owners[0].dead
            assert hands.owners[1].extents == held
            assert (await done(controller, token, await controller.scale(token, 3))).state == "done"

    asyncio.run(go())


def test_no_empty_pool_comes_beside_one_whose_lender_cannot_be_reached(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, hands, _):
            held = dict(hands.owners[0].extents)
            hands.faults.errors["lend"] = Unreachable("worker-0: cannot be reached")
            hands.owners[0].dead = True
            await until(lambda: hands.faults.calls.count("lend") > 1)
            assert len(hands.owners) == 1
            del hands.faults.errors["lend"]
            await until(lambda: "node/here" in controller._cluster.pools)
            assert hands.owners[1].extents == held

    asyncio.run(go())


@pytest.mark.parametrize("why", ["canceled as asked", "failed node there is gone"])
def test_a_start_that_ends_says_so(checkpoint: Path, why: str) -> None:
    async def go() -> None:
        hands = FakeHands(HERE, THERE)
        hands.faults.held.add("prepare")
        config = DeploymentConfig(str(checkpoint), 2, standbys=0)
        controller = Controller(config, cast(Any, hands))
        starting = asyncio.create_task(controller.start())
        await until(lambda: "prepare" in hands.faults.calls)
        if why.startswith("canceled"):
            await controller.cancel(config.token, "op-1")
        else:
            hands.alive = [HERE]
        hands.faults.held.clear()
        with pytest.raises(InternalError, match=rf"^{why}$"):
            await asyncio.wait_for(starting, LIMIT_S)
        await controller.stop()

    asyncio.run(go())


def test_nodes_that_are_silent_for_a_moment_end_nothing(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 1) as (controller, hands, token):
            hands.alive = []
            await until(lambda: controller._state.attempts == 4)
            assert not controller._state.failure
            assert (await controller.status()).phase == "recovering"
            hands.alive = [HERE]
            await until(lambda: not controller._state.broken and len(serving(hands)) == 1)
            assert (await done(controller, token, await controller.scale(token, 2))).state == "done"

    asyncio.run(go())


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENETUNREACH])
def test_who_cannot_ask_learns_nothing_of_others(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    async def refuse(*_: object) -> None:
        raise OSError(code, "")

    async def go() -> None:
        monkeypatch.setattr(asyncio, "open_connection", refuse)
        monkeypatch.setattr(knocking, "_FRESH_S", 0.0)
        door = Knocking()
        for _ in range(5):
            assert await door.answering([("10.0.0.1", 1)]) == {("10.0.0.1", 1)}
            await asyncio.sleep(0.01)

    asyncio.run(go())


def test_members_that_meet_at_a_store_meet_at_another_when_the_controller_has_restarted(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2, HERE, THERE) as (first, hands, token):
            hands.faults.held.add("prepare")
            asked = hands.faults.calls.count("prepare")
            operation = await first.scale(token, 3)
            await until(lambda: hands.faults.calls.count("prepare") > asked)
            opened = hands.faults.calls.count("open_store")
            second = await restarted(first, hands)
            hands.faults.held.clear()
            assert (await done(second, token, operation)).state == "done"
            assert hands.faults.calls.count("open_store") == opened + 1
            assert {w.prepared[max(w.prepared)].generation.exchange.store_port for w in serving(hands)} == {5555}
            await second.stop()

    asyncio.run(go())


def test_a_restarted_controller_ends_those_that_give_no_answer_as_soon_as_it_can(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 3, hang_timeout_s=0.3) as (first, hands, _):
            began_s = first._state.began_s
            for worker in hands.workers[1:]:
                worker.hangs = True
            hands.faults.errors["kill"] = InternalError("its node does not answer")
            second = await resumed(first, hands)
            await until(lambda: hands.faults.calls.count("kill") > 1)
            for worker in hands.workers[1:]:
                worker.hangs = False  # it is heard again, too late
            await asyncio.sleep(0.1)
            assert all(second._cluster.workers[f"worker-{n}"].unreached for n in (1, 2))
            del hands.faults.errors["kill"]
            await until(lambda: all(worker.dead for worker in hands.workers[1:3]))
            hands.workers[0].parked = "PeerLost"
            await until(lambda: len([w for w in serving(hands) if w.serving > 1]) == 3)
            assert second._state.began_s == began_s  # of the deployment, not of the controller
            await second.stop()

    asyncio.run(go())


def test_what_fails_again_and_again_says_so_and_is_tried_less_often(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_way, "_BACK_OFF_S", 0.02)
    rests_s, sleep = [], asyncio.sleep

    async def noted(delay_s: float) -> None:
        rests_s.append(delay_s)
        await sleep(delay_s)

    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, hands, token):
            hands.faults.errors["release"] = InternalError("it clings to its clients")
            operation = await controller.drain(token, "cpu-1")
            told = f"operation {operation.id}"
            while "tried 4 times" not in told:
                told = (await controller.operation(token, operation.id)).reason
                assert told in ("", *(f"tried {n} times so far: it clings to its clients" for n in range(2, 5)))
                await sleep(0.01)
            status = await controller.status()
            assert status.detail == status.operations[-1].reason
            assert status.operations[-1].state == "running"
            hands.faults.errors.clear()
            ended = await done(controller, token, operation)
            assert (ended.state, ended.reason) == ("done", "")
            assert (await controller.status()).detail == ""

    with monkeypatch.context() as patch:
        patch.setattr(under_way.asyncio, "sleep", noted)
        asyncio.run(go())
    longer = [rest_s for rest_s in rests_s if rest_s not in (0.0, 0.01, 0.02)]
    assert longer[:2] == [pytest.approx(rest_s) for rest_s in (0.06, 0.14)]


def test_what_only_rests_does_not_keep_others_waiting(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_way, "_LONGEST_BACK_OFF_S", 1000.0)
    monkeypatch.setattr(under_way, "_BACK_OFF_S", 0.02)

    async def go() -> None:
        async with controlled(checkpoint, 3) as (controller, hands, token):
            hands.faults.errors["release"] = InternalError("it clings to its clients")
            await controller.drain(token, "cpu-2")
            await until(lambda: "tried 9 times" in controller._under_way.trouble and controller._under_way._resting)
            hands.workers[1].dead = True
            hands.workers[0].parked = "PeerLost"
            await until(lambda: len(serving(hands)) == 2 and not hands.workers[0].parked)
            assert controller._under_way._resting

    asyncio.run(go())


def test_a_recovery_does_not_wait_for_what_rests_and_what_it_needs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have to rest for most of a minute."""
    monkeypatch.setattr(under_way, "_LONGEST_BACK_OFF_S", 1000.0)
    monkeypatch.setattr(under_way, "_BACK_OFF_S", 0.05)

    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, hands, _):
            hands.faults.errors["start_owner"] = InternalError("its address is in use")
            hands.owners[0].dead = True
            ways = controller._under_way
            await until(lambda: "tried 2 times" in ways.trouble)
            ways._vain = dict.fromkeys(ways._vain, (30, ""))
            await until(lambda: "tried 31 times" in ways.trouble and ways._resting)
            hands.faults.errors.clear()
            hands.workers[1].dead = True
            hands.workers[0].parked = "PeerLost"
            await until(lambda: len(serving(hands)) == 2 and not hands.workers[0].parked)

    asyncio.run(go())


def test_a_worker_whose_start_fails_leaves_no_process(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 1) as (controller, hands, token):
            hands.faults.errors["start_worker"] = Unreachable("worker-1: cannot be reached")
            assert (await done(controller, token, await controller.scale(token, 2))).state == "failed"
            assert hands.killed == ["worker-1", "worker-2", "worker-3"]

    asyncio.run(go())


def test_a_plan_is_for_what_is_there_when_it_is_asked_for(checkpoint: Path) -> None:
    """What was decided while it was made counts: a node that is drained by then gets no worker."""

    async def go() -> None:
        async with controlled(checkpoint, 2, HERE, THERE, device_memory_bytes=16 << 20) as (controller, _, token):
            drained, scaled = await asyncio.gather(controller.drain(token, "there"), controller.scale(token, 3))
            assert (await done(controller, token, scaled)).state == "done"
            assert {worker.node for worker in (await controller.status()).workers} == {"here"}
            assert await devices(controller) != []
            assert (await controller.operation(token, drained.id)).state in ("done", "superseded")

    asyncio.run(go())


def test_a_status_does_not_wait_for_an_owner_that_hangs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concertina.orchestrator.report._ANSWER_S", 0.05)

    async def go() -> None:
        async with controlled(checkpoint, 1, hang_timeout_s=1000.0) as (controller, hands, _):
            hands.owners[0].hangs = True
            assert (await controller.status()).pools == ()
            hands.owners[0].hangs = False
            assert len((await controller.status()).pools) == 1

    asyncio.run(go())


def test_rebalancing_needs_loads_that_are_there(checkpoint: Path, tmp_path: Path) -> None:
    async def go() -> None:
        path = str(tmp_path / "loads.json")
        async with controlled(checkpoint, 2, loads_file=path) as (controller, _, token):
            with pytest.raises(OperatorError, match="too few tokens were routed since the controller started"):
                await controller.rebalance(token)

    asyncio.run(go())


def test_what_a_peer_will_not_keep_is_not_copied_from_it() -> None:
    """Its pages may be something else's before the copy begins."""
    pools = {
        "device/a/cpu-0": SimpleNamespace(pages={"expert/0/0": (1,), "expert/0/1": (2,)}, source="0"),
        "device/a/cpu-1": SimpleNamespace(pages={"expert/0/0": (3,)}, source="1"),
        "device/a/cpu-2": SimpleNamespace(pages={}, source="2"),
    }
    kept = {"device/a/cpu-0": {"expert/0/1"}, "device/a/cpu-1": {"expert/0/0"}}
    registry = SimpleNamespace(config=None, cluster=SimpleNamespace(pools=pools), wanted=lambda: kept)
    deeds = Deeds(cast(Any, None), cast(Any, registry), cast(Any, None))
    plans = deeds._copies("device/a/cpu-2", ["expert/0/0", "expert/0/1", "expert/0/2"])
    assert [(plan.key, plan.source, plan.pages) for plan in plans] == [
        ("expert/0/0", "1", (3,)),
        ("expert/0/1", "0", (2,)),
    ]


def test_bytes_to_load_are_those_that_are_read(checkpoint: Path) -> None:
    """Also where the checkpoint has another dtype than what is served."""

    async def go() -> None:
        async with controlled(checkpoint, 1, dtype="bfloat16") as (controller, _, _):
            progress = await controller.progress()
            assert progress.loaded_bytes == progress.total_bytes > 0

    asyncio.run(go())
