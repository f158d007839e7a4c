"""The controller's shell over hands in memory: growing, shrinking, and every kind of loss."""

from __future__ import annotations

import asyncio
import pickle
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from concertina.errors import InternalError, OperatorError
from concertina.orchestrator import controller as module
from concertina.orchestrator.balancer import Balancer
from concertina.orchestrator.config import DeploymentConfig
from concertina.orchestrator.controller import Controller
from concertina.orchestrator.core.layout import Layout
from concertina.orchestrator.core.operations import end
from concertina.orchestrator.hands import NodeInfo
from concertina.orchestrator.kv_deeds import KVDeeds
from concertina.orchestrator.placing import Site, even_loads
from concertina.orchestrator.planning import Context
from concertina.orchestrator.preview import Preview
from concertina.orchestrator.resize import resized
from concertina.orchestrator.status import OperationStatus
from concertina.planners.cluster import Device
from concertina.planners.model import ModelSpec
from concertina.planners.placement import Placement
from concertina.workers.generation import AT_SWITCH_BLOCKS, LEDGER_KEY, kv_key
from concertina.workers.protocol import EngineLoad

from ..checkpoints import make_checkpoint
from .fake_hands import FakeHands, FakeWorker

LIMIT_S = 20.0
HERE, THERE = NodeInfo("here", "127.0.0.1", 4, 1 << 30), NodeInfo("there", "10.0.0.2", 4, 1 << 30)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))


@asynccontextmanager
async def controlled(checkpoint: Path, workers: int, *nodes: NodeInfo, **fields: Any) -> AsyncIterator[Any]:
    hands = FakeHands(*(nodes or (HERE,)))
    config = DeploymentConfig(str(checkpoint), workers, **{"standbys": 0, **fields})
    controller = Controller(config, hands)
    try:
        await asyncio.wait_for(controller.start(), LIMIT_S)
        yield controller, hands, config.token
    finally:
        await controller.stop()


async def until(holds: Callable[[], Any], what: str = "") -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0.01)


async def devices(controller: Controller) -> list[str]:
    return [address.device for address in (await controller.members()).workers if not address.draining]


def serving(hands: FakeHands) -> list[FakeWorker]:
    return [worker for worker in hands.workers if worker.serving and not worker.dead]


async def done(controller: Controller, token: str, operation: OperationStatus | Preview) -> OperationStatus:
    assert isinstance(operation, OperationStatus)
    ended = await controller.operation(token, operation.id, LIMIT_S)
    assert ended.state != "running", ended
    return ended


def test_up_and_down_by_any_step(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 1) as (controller, hands, token):
            before = (await controller.status()).workers[0].load
            for size in (2, 3, 1, 4, 1, 4):
                ended = await done(controller, token, await controller.scale(token, size))
                assert (ended.state, ended.reason) == ("done", ""), ended
                assert await devices(controller) == [f"cpu-{i}" for i in range(size)]
                status = await controller.status()
                assert [w.device for w in status.workers] == [f"cpu-{i}" for i in range(size)]
                (pool,) = status.pools
                assert sum(pool.by_purpose.values()) == pool.pages
                kept = {key for key in hands.owners[0].extents if key.startswith("kv/")}
                assert kept == {f"kv/cpu-{i}" for i in range(size)}
            assert len(serving(hands)) == 4
            assert before is not None
            assert [o.state for o in status.operations] == ["done"] * 7

    asyncio.run(go())


def test_a_node_that_joined_a_moment_ago_is_planned_with(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes are looked at four times a second; who plans looks at once."""

    async def go() -> None:
        async with controlled(checkpoint, 1) as (controller, hands, token):
            known = [HERE]

            async def nodes(*, anew: bool = False) -> list[NodeInfo]:
                if anew:
                    known[:] = hands.alive
                return list(known)

            monkeypatch.setattr(hands, "nodes", nodes)
            hands.alive = [HERE, THERE]
            await done(controller, token, await controller.scale(token, 2))
            assert {worker.node for worker in (await controller.status()).workers} == {"here", "there"}

    asyncio.run(go())


def test_the_same_target_is_the_same_operation_and_being_there_is_done(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 1) as (controller, _, token):
            first, again = await controller.scale(token, 2), await controller.scale(token, 2)
            assert first.id == again.id
            await done(controller, token, first)
            there = await controller.scale(token, 2)
            assert (there.state, there.reason) == ("done", "nothing to do")

    asyncio.run(go())


def test_two_that_ask_at_once_ask_for_the_same(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each plan is another one, as under traffic."""
    turn = count()

    def planned(current: Layout, workers: int, context: Context) -> Layout:
        return replace(resized(current, workers, context), reserved_experts=(next(turn),) * workers)

    monkeypatch.setattr(module, "resized", planned)

    async def go() -> None:
        async with controlled(checkpoint, 1) as (controller, hands, token):
            hands.faults.held.add("prepare")
            first, second = await asyncio.gather(controller.scale(token, 3), controller.scale(token, 3))
            assert next(turn) == 2, "both were planned"
            assert first.id == second.id
            hands.faults.held.clear()
            assert (await done(controller, token, first)).state == "done"

    asyncio.run(go())


def test_a_newer_target_supersedes_and_cancel_undoes(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 1) as (controller, hands, token):
            hands.faults.held.add("prepare")
            first = await controller.scale(token, 2)
            second = await controller.scale(token, 3)
            assert (await controller.operation(token, first.id)).state == "superseded"
            hands.faults.held.clear()
            assert (await done(controller, token, second)).state == "done"
            hands.faults.held.add("prepare")
            third = await controller.scale(token, 4)
            await until(lambda: controller._state.pending)
            assert (await controller.cancel(token, third.id)).state == "canceled"
            hands.faults.held.clear()
            await asyncio.sleep(0.3)
            assert await devices(controller) == ["cpu-0", "cpu-1", "cpu-2"]
            with pytest.raises(OperatorError, match="has ended already"):
                await controller.cancel(token, third.id)
            with pytest.raises(OperatorError, match="unknown"):
                await controller.cancel(token, "op-99")

    asyncio.run(go())


@pytest.mark.parametrize("call", ["scale", "rebalance", "drain", "undrain", "cancel", "operation"])
def test_without_the_token_nothing_is_done(checkpoint: Path, call: str) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, _, _):
            argument: dict[str, tuple[Any, ...]] = {"scale": (1,), "rebalance": ()}
            with pytest.raises(OperatorError, match="token"):
                await getattr(controller, call)("x" * 32, *argument.get(call, ("cpu-0",)))
            assert len((await controller.status()).operations) == 1

    asyncio.run(go())


def test_what_does_not_fit_is_refused_and_nothing_changes(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, _, token):
            for call, says in (
                (controller.scale(token, 0), "workers: 0; expected at least 1"),
                (controller.scale(token, 2.5), "workers: 2.5; expected a whole number"),
                (controller.scale(token, True), "workers: True; expected"),
                (controller.scale(token, "3"), "workers: '3'; expected"),
                (controller.drain(token, "cpu-0", -1.0), "deadline: -1.0; expected seconds, 0 or more"),
                (controller.drain(token, "cpu-0", nan), "deadline: nan; expected"),
                (controller.drain(token, "cpu-0", "60"), "deadline: '60'; expected"),
                (controller.rebalance(token), "too few tokens"),
                (controller.drain(token, "cpu-9"), "cpu-9"),
                (controller.undrain(token, "nowhere"), "no drained node is called 'nowhere'; drained: none"),
                (controller.scale(token, 100_000), "workers: 100000; expected at most 64"),
            ):
                with pytest.raises(OperatorError, match=says):
                    await call
            assert len(await devices(controller)) == 2
            assert isinstance(await controller.scale(token, 3, dry_run=True), Preview)
            assert len((await controller.status()).operations) == 1

    asyncio.run(go())


@pytest.mark.parametrize("call", ["fill", "prepare", "commit"])
def test_a_transition_that_fails_is_rolled_back(checkpoint: Path, call: str) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, hands, token):
            hands.faults.errors[call] = InternalError("a cable came loose")
            ended = await done(controller, token, await controller.scale(token, 3))
            if call == "commit":  # who cannot commit is as good as lost
                hands.faults.errors.clear()
            assert (ended.state, ended.reason) == ("failed", "a cable came loose")
            hands.faults.errors.clear()
            assert await devices(controller) == ["cpu-0", "cpu-1"]
            assert (await done(controller, token, await controller.scale(token, 3))).state == "done"

    asyncio.run(go())


def test_a_dry_run_says_what_it_would_supersede(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, hands, token):
            hands.faults.held.add("prepare")
            asked = await controller.scale(token, 3)
            for workers, supersedes in ((2, f"{asked.id} (scale 2 -> 3 workers)"), (3, "")):
                found = await controller.scale(token, workers, dry_run=True)
                assert isinstance(found, Preview)
                assert found.supersedes == supersedes
            await controller.cancel(token, asked.id)
            hands.faults.held.clear()

    asyncio.run(go())


def test_devices_that_never_come_fail_the_operation(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 1) as (controller, hands, token):
            hands.faults.errors["start_worker"] = InternalError("no process was started")
            ended = await done(controller, token, await controller.scale(token, 2))
            assert (ended.state, ended.reason) == ("failed", "no process was started")
            assert await devices(controller) == ["cpu-0"]

    asyncio.run(go())


def test_a_killed_worker_is_replaced_on_its_device(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2, standbys=1) as (controller, hands, _):
            await until(lambda: len(hands.workers) == 3)
            killed, peer, standby = hands.workers[1], hands.workers[0], hands.workers[2]
            killed.dead = True
            await until(lambda: controller._members.awaited)
            assert await devices(controller) == ["cpu-0"]
            peer.parked = "PeerLost"
            await until(lambda: standby.serving and peer.serving == standby.serving)
            await until(lambda: not controller._members.awaited)
            assert standby.device == "cpu-1"
            assert await devices(controller) == ["cpu-0", "cpu-1"]
            await until(lambda: len(hands.workers) == 4)  # the next standby
            controller.check()

    asyncio.run(go())


def test_memory_of_its_own_is_ready_for_the_next_device(checkpoint: Path) -> None:
    """Its owner is there before it is asked for; those that no device will have next are ended."""

    def pools(hands: FakeHands) -> set[str]:
        return {owner.config_.name.partition("/")[2] for owner in hands.owners if not owner.dead}

    def of(*devices: int) -> set[str]:
        return {"node/here", *(f"device/here/cpu-{i}" for i in devices)}

    async def go() -> None:
        async with controlled(checkpoint, 1, standbys=1, memory_mode="separate") as (controller, hands, token):
            await until(lambda: pools(hands) == of(0, 1))
            started = len(hands.owners)
            assert (await done(controller, token, await controller.scale(token, 2))).state == "done"
            assert len(hands.owners) == started
            await until(lambda: pools(hands) == of(0, 1, 2))
            assert (await done(controller, token, await controller.scale(token, 1))).state == "done"
            await until(lambda: pools(hands) == of(0, 1))

    asyncio.run(go())


def test_only_devices_keep_and_reserve_their_memory(checkpoint: Path) -> None:
    """A node's pool has addresses for much that never comes."""

    async def go(reserve: bool) -> dict[str, tuple[bool, bool]]:
        options = {"standbys": 1, "memory_mode": "separate", "reserve_memory": reserve}
        async with controlled(checkpoint, 1, **options) as (_, hands, _):
            await until(lambda: len(hands.owners) == 3)
            configs = [owner.config_ for owner in hands.owners]
            return {config.name.partition("/")[2]: (config.keep, config.reserve) for config in configs}

    for reserve in (True, False):
        device = (True, reserve)
        expected = {"node/here": (False, False), "device/here/cpu-0": device, "device/here/cpu-1": device}
        assert asyncio.run(go(reserve)) == expected


def test_a_kill_does_not_wait_for_planning(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning for the measured loads takes seconds; whoever dies meanwhile is replaced at once."""
    planning, end = threading.Event(), threading.Event()

    def plan(self: Balancer, site: Site, current: Placement) -> None:
        planning.set()
        end.wait(LIMIT_S)

    monkeypatch.setattr(Balancer, "due", property(lambda self: not planning.is_set()))
    monkeypatch.setattr(Balancer, "plan", plan)

    async def go() -> None:
        async with controlled(checkpoint, 2) as (_, hands, _):
            await until(planning.is_set)
            hands.workers[1].dead = True
            hands.workers[0].parked = "PeerLost"
            try:
                await until(lambda: len(serving(hands)) == 2 and hands.workers[0].serving > 1)
            finally:
                end.set()

    asyncio.run(go())


def test_a_hung_worker_is_killed_and_replaced(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2, hang_timeout_s=0.2) as (_, hands, _):
            hands.workers[1].hangs = True
            await until(lambda: hands.workers[1].dead)
            hands.workers[0].parked = "PeerLost"
            await until(lambda: len(serving(hands)) == 2)
            assert serving(hands)[1].device == "cpu-1"

    asyncio.run(go())


def test_a_hung_owner_is_killed_and_another_one_adopts(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2, hang_timeout_s=0.2) as (controller, hands, token):
            generation, held = controller._state.serving.id, dict(hands.owners[0].extents)
            hands.owners[0].hangs = True
            await until(lambda: "node/here" in controller._cluster.pools and len(hands.owners) == 2)
            assert hands.owners[0].dead
            assert hands.owners[1].extents == held
            assert controller._state.serving.id == generation
            assert (await done(controller, token, await controller.scale(token, 3))).state == "done"

    asyncio.run(go())


def test_a_failed_engine_is_replaced_and_one_that_keeps_failing_ends_it(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 1) as (controller, hands, token):
            hands.faults.errors["engine"] = RuntimeError("NaN everywhere")
            await until(lambda: controller._state.failure)
            assert "RuntimeError: NaN everywhere" in controller._state.failure
            assert (await controller.members()).workers == ()
            for call in (controller.scale(token, 2), controller.drain(token, "cpu-0"), controller.rebalance(token)):
                with pytest.raises(OperatorError, match=r"the deployment has failed: .*NaN everywhere"):
                    await call

    asyncio.run(go())


def test_a_killed_owner_is_replaced_by_one_that_adopts(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, hands, token):
            held = dict(hands.owners[0].extents)
            hands.owners[0].dead = True
            await until(lambda: len(hands.owners) == 2)
            await until(lambda: "node/here" in controller._cluster.pools)
            assert hands.owners[1].extents == held
            assert len(await devices(controller)) == 2
            assert (await done(controller, token, await controller.scale(token, 3))).state == "done"

    asyncio.run(go())


def test_everything_killed_comes_back_from_the_checkpoint(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, hands, _):
            for process in (*hands.owners, *hands.workers):
                process.dead = True
            await until(lambda: len(serving(hands)) == 2)
            assert len(hands.owners) == 2
            assert hands.owners[1].loaded == hands.owners[0].loaded
            await until(lambda: len(controller._members.workers) == 2)

    asyncio.run(go())


def test_a_node_that_is_gone_leaves_its_experts_to_the_others(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2, HERE, THERE) as (controller, hands, _):
            hands.alive = [HERE]
            for process in (hands.owners[1], hands.workers[1]):
                process.dead = True
            hands.workers[0].parked = "PeerLost"
            await until(
                lambda: controller._state.serving.id > 1
            )  # a worker that is lost is not listed before that, too
            await until(lambda: len(controller._members.workers) == 1)
            status = await controller.status()
            assert [w.device for w in status.workers] == ["cpu-0"]
            assert set(status.workers[0].experts_per_layer) == {5}

    asyncio.run(go())


def test_a_drained_device_goes_and_its_kv_has_an_heir(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 3) as (controller, hands, token):
            ended = await done(controller, token, await controller.drain(token, "cpu-1"))
            assert ended.state == "done"
            assert await devices(controller) == ["cpu-0", "cpu-2"]
            assert hands.workers[1].released_to in ("cpu-0", "cpu-2")

    asyncio.run(go())


@pytest.mark.parametrize("name", ["cpu-1", "there", "10.0.0.2"])
def test_a_drain_asked_for_again_is_the_same_and_may_bring_a_deadline(checkpoint: Path, name: str) -> None:
    """Also while KV is being copied: a notice that the node goes may come then."""

    async def go() -> None:
        nodes = () if name == "cpu-1" else (HERE, THERE)
        async with controlled(checkpoint, 2, *nodes, memory_mode="separate") as (controller, hands, token):
            hands.faults.held.add("adopt_kv")
            before = await controller.drain(token, name)
            await until(lambda: "adopt_kv" in hands.faults.calls)
            assert await devices(controller) == ["cpu-0"]
            assert (await controller.drain(token, name)).id == before.id
            assert hands.workers[0].limits_s == [None]
            assert (await controller.drain(token, name, 0.2)).id == before.id
            assert (await done(controller, token, before)).state == "done"
            unlimited, limit_s = hands.workers[0].limits_s
            assert unlimited is None
            assert limit_s is not None
            assert limit_s <= 0.2

    asyncio.run(go())


def test_a_deadline_ends_copying_ahead_of_the_switch_too(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2, memory_mode="separate") as (controller, hands, token):
            before = hands.faults.calls.count("prepare")
            hands.faults.held.add("prepare")
            asked = await controller.drain(token, "cpu-1", 30.0)
            await until(lambda: hands.faults.calls.count("prepare") > before)
            assert (await controller.drain(token, "cpu-1", 5.0)).id == asked.id
            await until(lambda: hands.workers[0].limits_s)
            hands.faults.held.clear()
            assert (await done(controller, token, asked)).state == "done"
            assert 0 < hands.workers[0].limits_s[0] <= 5
            (source,) = hands.workers[0].prepared[max(hands.workers[0].prepared)].inherits
            assert source.limit_s is not None
            assert 5 < source.limit_s <= 30

    asyncio.run(go())


def test_planning_takes_of_a_drains_deadline(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2, memory_mode="separate") as (controller, hands, token):
            plan = controller._replanner.plan

            async def slowly(what: Any) -> Any:
                await asyncio.sleep(0.2)
                return await plan(what)

            monkeypatch.setattr(type(controller._replanner), "plan", lambda _, what: slowly(what))
            by_s = hands.now_s() + 30.0
            asked = await controller.drain(token, "cpu-1", 30.0)
            assert controller._state.deadlines["cpu-1"] == pytest.approx(by_s, abs=0.1)
            assert (await done(controller, token, asked)).state == "done"

    asyncio.run(go())


def test_what_has_moved_and_what_will_add_up_after_a_retry(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 1, memory_mode="separate") as (controller, hands, token):
            filled = hands.faults.calls.count("fill")
            hands.faults.held.add("fill")
            asked = await controller.scale(token, 2)
            await until(lambda: hands.faults.calls.count("fill") > filled)
            assert controller._deeds.coming_bytes > 0
            hands.owners[-1].copied += 1000  # that came before it failed
            hands.faults.errors["fill"] = InternalError("a cable came loose")
            hands.faults.held.clear()
            await until(lambda: controller._deeds.coming_bytes == 0)
            hands.faults.errors.clear()
            assert (await done(controller, token, asked)).state == "done"
            assert hands.faults.calls.count("fill") > filled + 1
            assert controller._deeds.coming_bytes == 0
            assert controller._moved.operation == asked.id
            assert controller._moved.done == controller._moved.total > 1000

    asyncio.run(go())


def test_a_deadline_is_also_for_what_leaves_already(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 3, memory_mode="separate") as (controller, hands, token):
            hands.faults.held.add("adopt_kv")
            shrinking = await controller.scale(token, 2)
            await until(lambda: "adopt_kv" in hands.faults.calls)
            assert (await controller.drain(token, "cpu-2", 0.1)).id == shrinking.id
            assert (await done(controller, token, shrinking)).state == "done"
            assert [limit_s for worker in hands.workers for limit_s in worker.limits_s if limit_s is not None]
            with pytest.raises(OperatorError, match="no device or node is called 'cpu-2'"):
                await controller.drain(token, "cpu-2", 0.1)

    asyncio.run(go())


def test_a_late_deadline_disturbs_no_operation_that_follows(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 4, memory_mode="separate") as (controller, hands, token):
            hands.faults.held.add("adopt_kv")
            first = await controller.drain(token, "cpu-1")
            await until(lambda: "adopt_kv" in hands.faults.calls)
            second = await controller.drain(token, "cpu-2")
            assert (await controller.operation(token, first.id)).state == "superseded"
            assert (await controller.drain(token, "cpu-1", 0.1)).id == second.id
            await until(lambda: hands.workers[1].released_to is not None)
            await controller.drain(token, "cpu-2", 0.1)
            assert (await done(controller, token, second)).state == "done"
            assert await devices(controller) == ["cpu-0", "cpu-3"]

    asyncio.run(go())


def test_a_drain_of_what_is_leaving_lasts_until_it_has_left(checkpoint: Path) -> None:
    """Though what serves is what it asks for."""

    async def go() -> None:
        async with controlled(checkpoint, 2, memory_mode="separate") as (controller, hands, token):
            hands.faults.held.add("adopt_kv")
            first = await controller.drain(token, "cpu-1")
            await until(lambda: "adopt_kv" in hands.faults.calls)
            controller._state = end(controller._state, "failed", "for another reason", 0.0)
            second = await controller.drain(token, "cpu-1", 0.1)
            assert (second.id != first.id, second.state) == (True, "running")
            assert (await done(controller, token, second)).state == "done"
            assert hands.workers[1].released_to == "cpu-0"

    asyncio.run(go())


def test_rebalancing_asked_for_again_is_the_same(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was begun for the loads that were measured, by itself."""
    turn = count()

    def planned(current: Layout, *_: object) -> Layout:
        return replace(current, reserved_experts=(next(turn),) * len(current.seats))

    monkeypatch.setattr(module, "rebalanced", planned)
    monkeypatch.setattr(module, "placed", planned)
    monkeypatch.setattr(Balancer, "loads", even_loads(ModelSpec(3, 5, 1.0, 1.0)))
    monkeypatch.setattr(Balancer, "plan", lambda self, site, current: current)

    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, hands, token):
            for automatic in (False, True):
                hands.faults.held.add("prepare")
                if automatic:
                    await controller._follow_loads(controller._balancer, controller._state.serving.layout)
                    first = await controller.operation(token, controller._state.operations[-1].id)
                else:
                    first = await controller.rebalance(token)
                assert first.state == "running"
                assert (await controller.rebalance(token)).id == first.id
                hands.faults.held.clear()
                assert (await done(controller, token, first)).state == "done"

    asyncio.run(go())


def test_as_many_workers_as_there_were_before_a_node_was_lost(checkpoint: Path) -> None:
    """Asked for before the loss was noticed, or while it is being recovered from."""

    async def go() -> None:
        for noticed in (False, True):
            async with controlled(checkpoint, 2, HERE, THERE) as (controller, hands, token):
                hands.faults.held.add("prepare")
                hands.alive = [HERE]
                hands.owners[1].dead = hands.workers[1].dead = True
                hands.workers[0].parked = "PeerLost"
                if noticed:
                    await until(lambda: controller._state.broken)
                asked = await controller.scale(token, 2)
                hands.faults.held.clear()
                assert (await done(controller, token, asked)).state == "done"
                assert {worker.node for worker in (await controller.status()).workers} == {"here"}
                assert len(await devices(controller)) == 2

    asyncio.run(go())


def test_leavers_and_their_heirs_know_each_other_before_the_switch(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 4, memory_mode="separate") as (controller, hands, token):
            await done(controller, token, await controller.scale(token, 2))
            generation = hands.workers[0].serving
            heirs = {w.device: w.prepared[generation].inherits for w in hands.workers[:2]}
            sources = {s.pool.name: s for inherits in heirs.values() for s in inherits}
            assert len(sources) == 2
            for leaver in hands.workers[2:]:
                pool = leaver.prepared[max(leaver.prepared)].device.name
                assert sources[pool].pages
                assert pool in {s.pool.name for s in heirs[leaver.left_to]}
                assert leaver.released_to == leaver.left_to
            assert [w.left_to for w in hands.workers[:2]] == ["", ""]

    asyncio.run(go())


def test_who_has_too_much_hands_it_over_behind_the_switch(checkpoint: Path) -> None:
    """What is taken at the switch keeps everybody from making a step."""

    async def go() -> None:
        for used, left_to in ((AT_SWITCH_BLOCKS, "cpu-0"), (AT_SWITCH_BLOCKS + 1, "")):
            async with controlled(checkpoint, 2) as (controller, hands, token):
                hands.workers[1].load = EngineLoad(kv_blocks_used=used)
                await controller.status()  # asks everybody
                assert (await done(controller, token, await controller.scale(token, 1))).state == "done"
                assert hands.workers[1].left_to == left_to
                assert hands.workers[1].released_to == "cpu-0"

    asyncio.run(go())


@pytest.mark.parametrize(("mode", "released_to"), [("shared", "cpu-0"), ("separate", "")])
def test_kv_that_cannot_be_handed_over_is_let_go(checkpoint: Path, mode: str, released_to: str) -> None:
    """Where memory is shared its pages are the heir's all the same, and whoever takes its place has them."""

    async def go() -> None:
        async with controlled(checkpoint, 2, memory_mode=mode) as (controller, hands, token):
            hands.faults.errors["adopt_kv"] = InternalError("no answer")
            ended = await done(controller, token, await controller.drain(token, "cpu-1", 5.0))
            assert ended.state == "done"
            assert hands.workers[1].released_to == released_to

    asyncio.run(go())


@pytest.mark.parametrize("end", ["stops", "dies"])
def test_a_hand_over_that_its_heir_does_not_end_is_begun_again(checkpoint: Path, end: str) -> None:
    """By its successor, if it has died; until then the leaver keeps its sequences, and its KV stays."""

    async def go() -> None:
        async with controlled(checkpoint, 2, memory_mode="separate") as (controller, hands, token):
            heir, leaver = hands.workers
            hands.faults.held.add("adopt_kv")
            drained = await controller.drain(token, "cpu-1")
            await until(lambda: heir.limits_s)
            if end == "dies":
                heir.dead = True
                hands.faults.errors["adopt_kv"] = InternalError("its process ended")
            else:
                heir.parked = "PeerLost"
            kept = next(owner for owner in hands.owners if owner.config_.name.endswith("cpu-1"))
            hands.faults.held.clear()
            await until(lambda: controller._state.broken or controller._state.pending)
            hands.faults.errors.clear()
            assert leaver.released_to is None
            assert kv_key("cpu-1") in kept.extents
            assert (await done(controller, token, drained)).state == "done"
            assert leaver.released_to == "cpu-0"
            assert sum(len(worker.limits_s) for worker in hands.workers) > 1

    asyncio.run(go())


def test_a_device_that_has_come_again_has_no_heir(checkpoint: Path) -> None:
    """Else clients would look there for what it has, as soon as it leaves again, for another one."""

    async def go() -> None:
        async with controlled(checkpoint, 2) as (controller, hands, token):
            await done(controller, token, await controller.scale(token, 1))
            await until(lambda: controller._members.heirs == {"cpu-1": "cpu-0"})
            await done(controller, token, await controller.scale(token, 2))
            await until(lambda: not controller._members.heirs)
            hands.faults.held.add("adopt_kv")
            await controller.scale(token, 1)
            await until(lambda: controller._members.awaited or len(controller._state.serving.workers) == 1)
            assert not controller._members.heirs
            hands.faults.held.clear()

    asyncio.run(go())


def test_who_lost_its_device_to_another_worker_sends_its_clients_there(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 3) as (controller, hands, _):
            lost = hands.workers[1]
            lost.serving, lost.retired = 0, 7  # as if told to go to a generation that was withdrawn then
            for peer in (hands.workers[0], hands.workers[2]):
                peer.parked = "PeerLost"
            await until(lambda: lost.released_to is not None)
            assert lost.released_to == "cpu-1"
            await until(lambda: len(controller._members.workers) == 3)

    asyncio.run(go())


def test_a_hand_over_that_is_begun_again_has_the_same_heir(checkpoint: Path) -> None:
    """The controller was killed in it, when pages were the heir's already and it had not mapped them."""

    async def go() -> None:
        async with controlled(checkpoint, 3) as (first, hands, token):
            hands.faults.held.add("adopt_kv")
            operation = await first.drain(token, "cpu-1")
            await until(lambda: "adopt_kv" in hands.faults.calls)
            heir = next(worker for worker in hands.workers if worker.limits_s)
            second = await restarted(first, hands)
            await until(lambda: len(heir.limits_s) == 2)
            hands.faults.held.clear()
            assert (await done(second, token, operation)).state == "done"
            assert hands.workers[1].released_to == heir.device
            await second.stop()

    asyncio.run(go())


def test_who_cannot_be_told_where_kv_is_does_not_take_sequences_over_at_the_switch(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner may be dead just then; a successor has it when KV is handed over."""
    monkeypatch.setattr(KVDeeds, "inherits", lambda self, worker: {})

    async def go() -> None:
        async with controlled(checkpoint, 2, memory_mode="separate") as (controller, hands, token):
            assert (await done(controller, token, await controller.scale(token, 1))).state == "done"
            assert (hands.workers[1].left_to, hands.workers[1].released_to) == ("", "cpu-0")

    asyncio.run(go())


def test_a_drained_node_gets_no_workers_until_it_is_undrained(checkpoint: Path) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2, HERE, THERE, device_memory_bytes=16 << 20) as (controller, hands, token):

            async def nodes() -> set[str]:
                return {worker.node for worker in (await controller.status()).workers}

            assert await nodes() == {"here", "there"}
            await done(controller, token, await controller.drain(token, "there"))
            assert pickle.loads(hands.state).cordoned == {"there"}
            assert (await controller.status()).cordoned == ("there",)
            await done(controller, token, await controller.scale(token, 3))
            assert await nodes() == {"here"}
            with pytest.raises(OperatorError, match=r"no drained node is called 'here'; drained: there"):
                await controller.undrain(token, "here")
            assert await controller.undrain(token, "ther") == "there"
            assert (await controller.status()).cordoned == ()
            await done(controller, token, await controller.scale(token, 5))
            assert await nodes() == {"here", "there"}

    asyncio.run(go())


def test_all_devices_go_to_another_node_at_once(checkpoint: Path) -> None:
    """Every node that serves is drained, and another one has joined: nobody who was there stays."""

    async def go() -> None:
        elsewhere = NodeInfo("elsewhere", "10.0.0.3", 4, 1 << 30)
        async with controlled(checkpoint, 2, HERE, THERE) as (controller, hands, token):
            hands.faults.held.add("prepare")
            await controller.drain(token, "here")
            await until(lambda: "prepare" in hands.faults.calls)
            drained = await controller.drain(token, "there")
            hands.faults.held.clear()
            assert (await done(controller, token, drained)).state == "done"
            hands.alive = [HERE, THERE, elsewhere]
            for workers in (2, 3):
                assert (await done(controller, token, await controller.scale(token, workers))).state == "done"
                status = await controller.status()
                assert [worker.node for worker in status.workers] == ["elsewhere"] * workers
            assert len(serving(hands)) == 3

    asyncio.run(go())


@pytest.mark.parametrize("again", [False, True])
def test_memory_of_a_node_that_was_silent_is_given_back_when_it_is_there_again(checkpoint: Path, again: bool) -> None:
    """Also if its device has come again, elsewhere."""

    async def go() -> None:
        async with controlled(checkpoint, 2, HERE, THERE) as (controller, hands, token):
            hands.alive = [HERE]
            await until(lambda: hands.workers[0].serving > 1 and not controller._state.broken)
            assert hands.workers[0].told == [1], "between nodes it would not have noticed"
            (lost,) = [owner for owner in hands.owners if owner.config_.name.endswith("/there")]
            assert lost.extents
            assert not lost.dead
            if again:
                assert (await done(controller, token, await controller.scale(token, 2))).state == "done"
            hands.alive = [HERE, THERE]
            await until(lambda: lost.dead)
            assert set(lost.extents) <= {LEDGER_KEY}
            assert await devices(controller) == ["cpu-0", "cpu-1"][: 1 + again]

    asyncio.run(go())


def test_a_restarted_controller_knows_the_deadline(checkpoint: Path) -> None:
    """The heir never comes to an end by itself; what it has by the deadline is what there is."""

    async def go() -> None:
        async with controlled(checkpoint, 2, memory_mode="separate") as (first, hands, token):
            hands.faults.held.add("adopt_kv")
            operation = await first.drain(token, "cpu-1", 2.0)
            await until(lambda: "adopt_kv" in hands.faults.calls)
            second = await restarted(first, hands)
            assert (await done(second, token, operation)).state == "done"
            assert hands.workers[1].released_to == "cpu-0"
            before, after = hands.workers[0].limits_s
            assert 0.0 < after < before <= 2.0
            await second.stop()

    asyncio.run(go())


def test_plans_for_measured_loads_know_every_devices_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a placement that it does not hold changes nothing."""
    kind = {"memory_bytes": 16 << 20, "flops": 1e10, "bandwidth_bytes_s": 1e10}
    fleet = tuple(Device(f"d{i}", "slow", **kind) for i in range(2))
    sites: list[Site] = []

    def plan(self: Balancer, site: Site, current: Placement) -> Placement:
        sites.append(site)
        return current

    def refused(current: Layout, placement: Placement, context: Context) -> Layout:
        raise OperatorError("device-memory: too small")

    monkeypatch.setattr(Balancer, "due", property(lambda self: len(sites) < 2))
    monkeypatch.setattr(Balancer, "plan", plan)
    monkeypatch.setattr(module, "placed", refused)

    async def go() -> None:
        async with controlled(checkpoint, 2, fleet=fleet, memory_mode="separate") as (controller, _, _):
            await until(lambda: len(sites) == 2)
            assert all(site.room < inf for site in sites)
            assert [o.text for o in controller._state.operations] == ["2 workers"]

    asyncio.run(go())


def test_requests_are_shared_out_by_the_devices_speeds(checkpoint: Path) -> None:
    sizes = {"memory_bytes": 16 << 20, "bandwidth_bytes_s": 1e10}
    fleet = (Device("slow", "slow", flops=1e10, **sizes), Device("fast", "fast", flops=4e10, **sizes))

    async def go() -> None:
        async with controlled(checkpoint, 2, fleet=fleet, memory_mode="separate") as (controller, _, _):
            speeds = {address.device: address.speed for address in (await controller.members()).workers}
            assert speeds == {"slow": 0.25, "fast": 1.0}

    asyncio.run(go())


async def resumed(first: Controller, hands: FakeHands) -> Controller:
    assert first._loop is not None
    for task in (first._loop, *first._under_way.tasks.values()):
        task.cancel()
    second = Controller(first._config, hands)
    await second.resume()
    return second


async def restarted(first: Controller, hands: FakeHands) -> Controller:
    second = await resumed(first, hands)
    await asyncio.wait_for(second.start(), LIMIT_S)
    return second


def test_a_restarted_controller_takes_no_other_checkpoint_for_its_own(checkpoint: Path, tmp_path: Path) -> None:
    """What it serves is described by what it read first; its folder may hold other weights by now, or none."""
    folder = shutil.copytree(checkpoint, tmp_path / "served")

    async def go() -> None:
        async with controlled(folder, 2) as (first, hands, token):
            before = pickle.loads(hands.model)
            shutil.rmtree(folder)
            second = await restarted(first, hands)
            assert (await done(second, token, await second.scale(token, 3))).state == "done"
            assert pickle.loads(hands.model) == before
            await second.stop()
            hands.state = None

    asyncio.run(go())


@pytest.mark.parametrize("moment", ["steady", "growing"])
def test_a_restarted_controller_goes_on(checkpoint: Path, moment: str) -> None:
    async def go() -> None:
        async with controlled(checkpoint, 2) as (first, hands, token):
            operation = await first.scale(token, 3) if moment == "growing" else None
            await asyncio.sleep(0.02)
            second = await restarted(first, hands)
            if operation is not None:
                assert (await done(second, token, operation)).state == "done"
            await until(lambda: len(second._members.workers) == (3 if operation else 2))
            assert (await done(second, token, await second.scale(token, 1))).state == "done"
            await second.stop()
            hands.state = None

    asyncio.run(go())
