"""An actor that has a controller's hands and nothing that moves them; as a program: a driver of one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from concertina.orchestrator import remote
from concertina.orchestrator.config import NAMESPACE
from concertina.orchestrator.ray_hands import RayHands, end_all
from concertina.orchestrator.starting import started
from concertina.workers.engine.scheduler import SchedulerConfig
from concertina.workers.owner_roles import OwnerConfig
from concertina.workers.roles import WorkerConfig

PAGE_BYTES = 2 << 20


class Keeper:
    """Pools are named after the node that they are on: ``node-0`` is the keeper's own."""

    def __init__(self, deployment: str) -> None:
        self.deployment = deployment
        self.hands = RayHands(deployment)

    async def pid(self) -> int:
        return os.getpid()

    async def start(self, pool: str) -> int:
        """Process of the owner of a pool."""
        own = ray.get_runtime_context().get_node_id()
        nodes = sorted((node.id for node in await self.hands.nodes()), key=lambda node: node != own)
        config = OwnerConfig(f"{self.deployment}/{pool}", 4, PAGE_BYTES, "token")
        handle: Any = await self.hands.start_owner(nodes[int(pool.removeprefix("node-"))], config)
        return int(await handle.alive())

    async def hire(self, limit_s: float) -> None:
        """Start a worker on this node, and have its first answer."""
        config = WorkerConfig("worker-0", "127.0.0.1", "t" * 16, 1, SchedulerConfig(max_model_len=64))

        async def answering() -> None:
            handle = await self.hands.start_worker(ray.get_runtime_context().get_node_id(), config)
            await handle.report()

        await started(self.hands, config.name, config.name, limit_s, answering())

    async def begun(self, name: str) -> bool:
        return await self.hands.begun(name)

    async def found(self) -> dict[str, int]:
        owners: dict[str, Any] = dict((await self.hands.existing()).owners)
        return {name.rpartition("/")[2]: await owner.alive() for name, owner in owners.items()}

    async def wait_on(self, pool: str) -> None:
        await (await self.hands.existing()).owners[f"{self.deployment}/{pool}"].wait(100.0)

    async def kill(self, name: str) -> None:
        await self.hands.kill(name)

    async def sweep(self) -> None:
        await self.hands.sweep()

    async def save(self, state: bytes) -> None:
        await self.hands.save(state)

    async def load(self) -> bytes | None:
        return await self.hands.load()

    async def keep(self, model: bytes) -> None:
        await self.hands.keep(model)

    async def kept(self) -> bytes | None:
        return await self.hands.kept()

    async def forget(self) -> None:
        await self.hands.forget()


@contextmanager
def keeper_of(deployment: str) -> Iterator[Any]:
    kind: Any = ray.remote(Keeper)
    own: str = ray.get_runtime_context().get_node_id()
    place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(own, soft=False)
    options = {"name": remote.controller_name(deployment), "num_cpus": 0, "max_restarts": -1}
    actor = kind.options(**options, scheduling_strategy=place).remote(deployment)
    try:
        yield actor
    finally:
        ray.kill(actor)
        end_all(deployment)


def main(address: str, deployment: str) -> None:
    """Start two owners, print all process ids, and wait to be killed."""
    ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    with keeper_of(deployment) as keeper:
        calls = [keeper.pid.remote(), keeper.start.remote("node-0"), keeper.start.remote("node-1")]
        print(*remote.ask(calls), flush=True)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
