"""Nodes that join, are drained and vanish while requests stream. The nodes are raylets of this machine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from concertina.orchestrator import remote
from concertina.orchestrator.config import NAMESPACE, DeploymentConfig, EngineOptions
from concertina.orchestrator.controller_actor import launch
from concertina.orchestrator.ray_hands import end_all
from concertina.orchestrator.status import DeploymentStatus, OperationStatus, PoolStatus
from ray.cluster_utils import Cluster

from ..checkpoints import make_checkpoint
from .command import Process, descendants, wait_for
from .streams import LENGTH, Streams

pytestmark = [pytest.mark.ray, pytest.mark.slow]
WAIT_S = 60.0
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    directory = tempfile.mkdtemp(prefix="ct-", dir="/tmp")  # Ray's Unix sockets lie below: a short path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", directory)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        ray.init(cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("olmoe", tmp_path_factory.mktemp("model"))


async def join(cluster: Cluster) -> Any:
    """Another node, while streams go on. It ends with the thread that started it, at the end of the event loop."""
    with pytest.MonkeyPatch.context() as patch:
        # They handle signals, which can be asked for in the main thread only.
        patch.setattr("ray._private.node.Node._register_shutdown_hooks", lambda node: None)
        return await asyncio.to_thread(cluster.add_node, **NODE)


def processes(node: Any) -> list[Process]:
    """The raylet and everything below it."""
    return descendants(node.all_processes["raylet"][0].process.pid)


def vanish(cluster: Cluster, node: Any) -> None:
    """As if its power had failed."""
    gone(cluster, node, kill(processes(node)))


def kill(everything: list[Process]) -> list[Process]:
    for process in everything:
        os.kill(process.pid, signal.SIGKILL)
    return everything


def gone(cluster: Cluster, node: Any, everything: list[Process]) -> None:
    wait_for(lambda: not any(p.runs for p in everything), lambda: "killed, and still there")
    cluster.remove_node(node, allow_graceful=False)


def silence(node: Any) -> list[Process]:
    """As if its network had failed: connections stay, and nothing comes any more. Returns whom to kill afterwards.

    Not quite so: its ports accept connections, so that it counts as there.
    """
    everything = processes(node)
    for process in everything:
        os.kill(process.pid, signal.SIGSTOP)
    return everything


@contextmanager
def deployed(checkpoint: Path, name: str, **fields: Any) -> Iterator[tuple[DeploymentConfig, Any]]:
    """Configuration and controller of a deployment that serves."""
    engine = EngineOptions(max_model_len=LENGTH, threads=1)
    options = {"dtype": "float32", "rebalance_s": 0.0, "engine": engine, "exchange_timeout_s": 5.0, **fields}
    config = DeploymentConfig(str(checkpoint), name=name, **options)
    controller = launch(config)
    try:
        remote.ask(controller.start.remote())
        yield config, controller
        remote.ask(controller.stop.remote())
    finally:
        ray.kill(controller)
        end_all(name)


async def done(controller: Any, operation: OperationStatus, token: str) -> OperationStatus:
    ended: OperationStatus = await controller.operation.remote(token, operation.id, WAIT_S)
    assert (ended.state, ended.reason) == ("done", ""), ended
    return ended


async def scale(controller: Any, config: DeploymentConfig, workers: int) -> DeploymentStatus:
    await done(controller, await controller.scale.remote(config.token, workers), config.token)
    return await settled(controller, workers)


async def settled(controller: Any, workers: int) -> DeploymentStatus:
    async with asyncio.timeout(WAIT_S):
        while True:
            status: DeploymentStatus = await controller.status.remote()
            if status.phase == "serving" and [w.state for w in status.workers] == ["serving"] * workers:
                break
            await asyncio.sleep(0.02)
    return status


async def same_pages(controller: Any, before: DeploymentStatus) -> None:
    """Return once pools hold as many pages for every purpose as they did; the last are given back in later turns."""
    wanted = [(pool.name, pool.by_purpose) for pool in before.pools]
    async with asyncio.timeout(WAIT_S):
        while [(pool.name, pool.by_purpose) for pool in (await controller.status.remote()).pools] != wanted:
            await asyncio.sleep(0.05)


def nodes_of(status: DeploymentStatus) -> set[str]:
    return {worker.node for worker in status.workers}


def pool_on(status: DeploymentStatus, node: str) -> PoolStatus:
    (pool,) = [pool for pool in status.pools if pool.node == node]
    return pool


def test_a_node_joins_is_drained_and_leaves_and_another_one_vanishes(checkpoint: Path, cluster: Cluster) -> None:
    async def go(config: DeploymentConfig, controller: Any) -> None:
        async with Streams.of(config.name, config.token) as streams:
            before = await settled(controller, 1)
            assert before.exchange == "solo"
            (head,) = nodes_of(before)
            node = await join(cluster)
            grown = await scale(controller, config, 2)
            assert (grown.exchange, nodes_of(grown)) == ("gloo", {head, node.node_id})
            await streams.more(6)

            shrunk = await drain(streams, controller, config, node.node_id)
            assert (shrunk.exchange, nodes_of(shrunk)) == ("solo", {head})
            assert pool_on(shrunk, head).copied_bytes > 0
            assert pool_on(shrunk, head).loaded_bytes == pool_on(grown, head).loaded_bytes
            assert nodes_of(await scale(controller, config, 2)) == {head}, "drained, and used again"
            shrunk = await scale(controller, config, 1)
            await asyncio.to_thread(cluster.remove_node, node)
            streams.clear()
            await streams.more(12)
            assert not streams.resumed
            assert (await settled(controller, 1)).generation == shrunk.generation

            node = await join(cluster)
            assert nodes_of(await scale(controller, config, 2)) == {head, node.node_id}
            left = await lose(streams, controller, cluster, node)
            assert nodes_of(left) == {head}
            assert pool_on(left, head).loaded_bytes > pool_on(shrunk, head).loaded_bytes
            await same_pages(controller, before)

    with deployed(checkpoint, "joining") as (config, controller):
        asyncio.run(go(config, controller))


async def drain(streams: Streams, controller: Any, config: DeploymentConfig, node: str) -> DeploymentStatus:
    """Empty a node: whatever runs there goes on elsewhere, and finds all it had computed."""
    streams.clear()
    drained = await controller.drain.remote(config.token, node, 30.0)
    await done(controller, drained, config.token)
    status = await settled(controller, 1)
    assert streams.resumed
    for sequence in streams.resumed:
        assert sequence.cached == sequence.tokens - 1, sequence  # the last one has to be computed to know the next
    return status


async def lose(streams: Streams, controller: Any, cluster: Cluster, node: Any) -> DeploymentStatus:
    """A node is gone without notice: whatever ran there goes on elsewhere."""
    await streams.more(6)
    streams.clear()
    await asyncio.to_thread(vanish, cluster, node)
    status = await settled(controller, 1)
    await streams.more(6)
    assert streams.resumed
    print(f"silence when a node vanished: {streams.silent_s:.2f} s")
    return status


def test_a_node_that_falls_silent_is_not_waited_for_in_the_exchange(checkpoint: Path, cluster: Cluster) -> None:
    """Two of three nodes stop, and go on without it; over gloo they would have waited for it for half an hour."""

    async def go(config: DeploymentConfig, controller: Any, lost: Any) -> None:
        async with Streams.of(config.name, config.token) as streams:
            status = await settled(controller, 3)
            assert (status.exchange, len(nodes_of(status))) == ("gloo", 3)
            await streams.more(6)
            stopped = await asyncio.to_thread(silence, lost)
            try:
                async with asyncio.timeout(WAIT_S):
                    while [w.state for w in (await controller.status.remote()).workers].count("parked") < 2:
                        await asyncio.sleep(0.1)
            finally:
                for process in stopped:
                    os.kill(process.pid, signal.SIGKILL)
            await asyncio.to_thread(cluster.remove_node, lost, False)
            assert lost.node_id not in nodes_of(await settled(controller, 2))
            await streams.more(6)

    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    with deployed(checkpoint, "silent", workers=3, exchange_timeout_s=1800.0, hang_timeout_s=4.0) as (
        config,
        controller,
    ):
        asyncio.run(go(config, controller, nodes[1]))
    cluster.remove_node(nodes[0])


def test_experts_with_replicas_need_not_be_loaded_when_a_node_vanishes(
    checkpoint: Path, tmp_path: Path, cluster: Cluster
) -> None:
    async def go(config: DeploymentConfig, controller: Any, node: Any) -> None:
        async with Streams.of(config.name, config.token) as streams:
            before = await settled(controller, 2)
            (head,) = nodes_of(before) - {node.node_id}
            assert {worker.experts_per_layer for worker in before.workers} == {(7, 7, 7)}
            left = await lose(streams, controller, cluster, node)
            assert nodes_of(left) == {head}
            for bytes_of in (lambda pool: pool.loaded_bytes, lambda pool: pool.copied_bytes):
                assert bytes_of(pool_on(left, head)) == bytes_of(pool_on(before, head))

    node = cluster.add_node(**NODE)
    placement = everything_on_both(checkpoint, tmp_path / "placement.json")
    fields = {"workers": 2, "spare_slots": 7, "placement_file": str(placement)}
    with deployed(checkpoint, "replicas", **fields) as (config, controller):
        asyncio.run(go(config, controller, node))


def test_a_node_that_vanishes_during_a_change_leaves_what_served(checkpoint: Path, cluster: Cluster) -> None:
    """While its worker starts, as its generation is formed, and right behind the switch; nothing is left of it."""

    async def go(config: DeploymentConfig, controller: Any) -> None:
        async with Streams.of(config.name, config.token) as streams:
            before = await settled(controller, 1)
            for phase in ("moving weights", "forming the generation", "switched"):
                base, node = await settled(controller, 1), await join(cluster)
                operation = await controller.scale.remote(config.token, 2)
                assert await reached(controller, base.generation, phase) == (phase != "switched"), "it was missed"
                await asyncio.to_thread(vanish, cluster, node)
                ended = await controller.operation.remote(config.token, operation.id, WAIT_S)
                assert ended.state in ("done", "failed"), ended
                assert nodes_of(await settled(controller, 1)) == nodes_of(before)
                await same_pages(controller, before)
                await streams.more(6)

    with deployed(checkpoint, "vanishing") as (config, controller):
        asyncio.run(go(config, controller))


def test_a_node_that_vanishes_while_it_is_drained_leaves_nothing(checkpoint: Path, cluster: Cluster) -> None:
    """As soon as that is asked for, when the generation without it is still to come, and right behind the switch."""

    async def go(config: DeploymentConfig, controller: Any) -> None:
        async with Streams.of(config.name, config.token) as streams:
            before = await settled(controller, 1)
            for switched in (False, True):
                node = await join(cluster)
                base = await scale(controller, config, 2)
                assert nodes_of(base) == {*nodes_of(before), node.node_id}
                await streams.more(6)
                everything = await asyncio.to_thread(processes, node)
                operation = await controller.drain.remote(config.token, node.node_id, 30.0)
                if switched:
                    assert not await reached(controller, base.generation, "nothing")
                kill(everything)
                there: OperationStatus = await controller.operation.remote(config.token, operation.id)
                assert switched or not there.committed_s
                await asyncio.to_thread(gone, cluster, node, everything)
                ended = await controller.operation.remote(config.token, operation.id, WAIT_S)
                assert ended.state == "done", ended
                assert nodes_of(await settled(controller, 1)) == nodes_of(before)
                await same_pages(controller, before)
                await streams.more(6)

    with deployed(checkpoint, "lost-in-drain") as (config, controller):
        asyncio.run(go(config, controller))


def test_a_node_that_serves_and_vanishes_during_a_change_leaves_what_served(checkpoint: Path, cluster: Cluster) -> None:
    """One that stays, while another one joins; the node that joins serves on if the switch has come."""

    async def go(config: DeploymentConfig, controller: Any) -> None:
        async with Streams.of(config.name, config.token) as streams:
            before = await settled(controller, 1)
            for phase in ("forming the generation", "switched"):
                lost = await join(cluster)
                base = await scale(controller, config, 2)
                assert lost.node_id in nodes_of(base)
                await streams.more(6)
                new = await join(cluster)
                everything = await asyncio.to_thread(processes, lost)
                operation = await controller.scale.remote(config.token, 3)
                assert await reached(controller, base.generation, phase) == (phase != "switched"), "it was missed"
                kill(everything)
                await asyncio.to_thread(gone, cluster, lost, everything)
                ended = await controller.operation.remote(config.token, operation.id, WAIT_S)
                assert ended.state in ("done", "failed"), ended
                left = await settled(controller, 2 if phase == "switched" else 1)
                assert nodes_of(left) == nodes_of(before) | ({new.node_id} if phase == "switched" else set())
                await streams.more(6)
                if len(left.workers) > 1:
                    left = await scale(controller, config, 1)
                assert nodes_of(left) == nodes_of(before)
                await asyncio.to_thread(cluster.remove_node, new)
                await same_pages(controller, before)

    with deployed(checkpoint, "serving-lost") as (config, controller):
        asyncio.run(go(config, controller))


async def reached(controller: Any, generation: int, phase: str) -> bool:
    """Whether the generation behind that one is in a phase, as soon as it is so; or serves."""
    async with asyncio.timeout(WAIT_S):
        while True:
            status: DeploymentStatus = await controller.status.remote()
            if status.generation > generation:
                return False
            if phase in status.phase:
                return True
            await asyncio.sleep(0.005)


def everything_on_both(checkpoint: Path, path: Path) -> Path:
    model = json.loads((checkpoint / "config.json").read_text())
    layer = [[{"device": d, "slot": e, "share": 0.5} for d in range(2)] for e in range(model["num_experts"])]
    path.write_text(json.dumps({"devices": ["a", "b"], "layers": [layer] * model["num_hidden_layers"]}))
    return path
