"""The controller as a Ray actor, and its hands: they start owners and workers as actors on chosen nodes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import InternalError
from ..workers.owner import OwnerConfig
from ..workers.roles import WorkerConfig
from ..workers.services import OwnerService, WorkerService
from .config import DeploymentConfig
from .controller import Controller
from .hands import NodeInfo, OwnerHandle, WorkerHandle
from .status import DeploymentStatus, Progress, WorkerAddress

_ON_CHOSEN_NODE: Any = {"num_cpus": 0, "max_concurrency": 8}  # the controller has counted cores itself


class _Handle:
    """An actor whose methods are awaited as those of a local object; a dead one raises `InternalError`."""

    def __init__(self, actor: Any, what: str) -> None:
        self._actor = actor
        self._what = what

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._actor, name)

        async def call(*args: object) -> Any:
            try:
                return await method.remote(*args)
            except ray.exceptions.RayTaskError as e:
                raise e.cause from None
            except ray.exceptions.RayActorError as e:
                raise InternalError(f"{self._what}: its process ended") from e

        return call


class RayHands:
    """`Hands` over the Ray cluster that this process belongs to."""

    def __init__(self) -> None:
        self._store: Any = None

    async def nodes(self) -> list[NodeInfo]:
        alive = [n for n in await asyncio.to_thread(ray.nodes) if n["Alive"]]
        alone = len(alive) == 1  # then nothing needs to listen beyond loopback
        return [
            NodeInfo(
                n["NodeID"],
                "127.0.0.1" if alone else n["NodeManagerAddress"],
                int(n["Resources"].get("CPU", 1)),
                int(n["Resources"].get("memory", 0)),
            )
            for n in alive
        ]

    async def start_owner(self, node: str, config: OwnerConfig) -> OwnerHandle:
        actor = ray.remote(OwnerService).options(**_ON_CHOSEN_NODE, scheduling_strategy=_on(node)).remote(config)
        return cast(OwnerHandle, _Handle(actor, f"memory owner {config.name}"))

    async def start_worker(self, node: str, config: WorkerConfig) -> WorkerHandle:
        actor = ray.remote(WorkerService).options(**_ON_CHOSEN_NODE, scheduling_strategy=_on(node)).remote(config)
        return cast(WorkerHandle, _Handle(actor, config.name))

    async def open_store(self) -> tuple[str, int]:
        import torch.distributed as dist

        host: str = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def now_s(self) -> float:
        return time.monotonic()


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


class ControllerService:
    """The controller as it is called from other processes."""

    def __init__(self, config: DeploymentConfig) -> None:
        logging.basicConfig(level=logging.INFO)
        self._controller = Controller(config, RayHands())

    async def start(self) -> None:
        await self._controller.start()

    async def check(self) -> None:
        self._controller.check()

    async def progress(self) -> Progress:
        return await self._controller.progress()

    async def members(self) -> list[WorkerAddress]:
        return self._controller.members()

    async def status(self) -> DeploymentStatus:
        return await self._controller.status()

    async def stop(self) -> None:
        await self._controller.stop()
