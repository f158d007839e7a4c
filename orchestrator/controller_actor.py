"""The controller as a Ray actor, which Ray starts again when its process dies."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import OperatorError
from ..workers.background import stay_in_background
from .config import NAMESPACE, DeploymentConfig
from .controller import Controller
from .lifeline import Identity
from .preview import Preview
from .ray_hands import RayHands
from .remote import controller_name
from .status import DeploymentStatus, MemberList, OperationStatus, Progress


class ControllerService:
    """The controller as it is called from other processes; a restarted one goes on by itself, before it answers."""

    def __init__(self, config: DeploymentConfig) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        stay_in_background()
        self._name = config.name
        self._hands = RayHands(config.name)
        self._controller = Controller(config, self._hands)
        restarted = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        self._begun = asyncio.get_running_loop().create_task(self._begin(restarted))

    async def _begin(self, restarted: bool) -> None:
        resumes = restarted and await self._hands.load() is not None  # else it had not got as far as starting anything
        if not resumes:
            await self._hands.sweep()
        identity = Identity.of_this_process()
        await asyncio.to_thread(identity.note, self._name, controller_name(self._name))
        if resumes:
            await self._controller.resume()

    async def _ready(self) -> Controller:
        await asyncio.shield(self._begun)  # who asks learns why it cannot go on
        return self._controller

    async def alive(self) -> None:
        """Answer at once, however far it is."""

    async def start(self) -> None:
        await (await self._ready()).start()

    async def check(self) -> None:
        (await self._ready()).check()

    async def progress(self) -> Progress:
        return await (await self._ready()).progress()

    async def members(self, seen: int = -1, timeout_s: float = 10.0) -> MemberList:
        return await (await self._ready()).members(seen, timeout_s)

    async def status(self) -> DeploymentStatus:
        return await (await self._ready()).status()

    async def scale(self, token: str, workers: int, dry_run: bool = False) -> OperationStatus | Preview:
        return await (await self._ready()).scale(token, workers, dry_run)

    async def rebalance(self, token: str) -> OperationStatus:
        return await (await self._ready()).rebalance(token)

    async def drain(self, token: str, device: str, deadline_s: float | None = None) -> OperationStatus:
        return await (await self._ready()).drain(token, device, deadline_s)

    async def undrain(self, token: str, node: str) -> str:
        return await (await self._ready()).undrain(token, node)

    async def cancel(self, token: str, op_id: str) -> OperationStatus:
        return await (await self._ready()).cancel(token, op_id)

    async def operation(self, token: str, op_id: str, wait_s: float = 0.0) -> OperationStatus:
        return await (await self._ready()).operation(token, op_id, wait_s)

    async def stop(self) -> None:
        self._begun.cancel()
        await self._controller.stop()


def launch(config: DeploymentConfig) -> Any:
    """Start a deployment's controller beside the caller; it lives as long as the caller's job, through any restart.

    Calls that a restart interrupts fail and are asked again by their callers (`remote.ask_again`).

    Raises
    ------
    OperatorError
        A deployment of that name runs in this cluster.
    """
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    options: Any = {"namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    kind: Any = ray.remote(ControllerService)
    try:
        return kind.options(name=controller_name(config.name), **options).remote(config)
    except ValueError as e:
        raise OperatorError(f"name: a deployment called {config.name!r} already runs in this cluster") from e
