"""A real deployment in this process's Ray: started, changed, and stopped as ``concertina serve`` and ``scale`` do."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal

import ray
from concertina.orchestrator.config import NAMESPACE, DeploymentConfig, EngineOptions
from concertina.orchestrator.controller_actor import launch
from concertina.orchestrator.preview import Preview
from concertina.orchestrator.ray_hands import end_all
from concertina.orchestrator.status import DeploymentStatus, OperationStatus
from concertina.workers.model_files import ModelFiles

Mode = Literal["shared", "separate", "reserved", "emulated", "emulated_separate", "emulated_reserved"]
"""How devices hold memory: that of their node; each its own; each its own, all of it from the start.

The same with emulated steps; ``emulated`` shares memory.
"""

LIMIT_S = 300.0
_POLL_S = 0.2
_BLOCK_TOKENS = 16
_KV_BLOCKS = 256  # room of a device beside all experts: twice what eight clients use
_MODEL_LEN = 512
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Answer:
    """Monotonic seconds of an operation's request, begin, commit and end, and the bytes that it asked for.

    The controller plans before it begins. Bytes are those of the weights, not rounded to whole pages.
    """

    asked_s: float
    begun_s: float
    committed_s: float
    ended_s: float
    planned_bytes: int


def emulates(mode: Mode) -> bool:
    """Whether steps take at least as long as an accelerator's, so that the host's cores are free meanwhile."""
    return mode.startswith("emulated")


def configured(
    checkpoint: str, mode: Mode, workers: int, threads: int, emulated_step_ms: float = 0.0
) -> DeploymentConfig:
    """A deployment whose devices hold all experts and a KV cache that clients fill within seconds."""
    model = ModelFiles.open(checkpoint)
    experts = len(model.config.moe_layers) * model.config.experts
    device_bytes = 1.1 * (experts * model.expert_bytes + _KV_BLOCKS * model.kv_block_bytes(_BLOCK_TOKENS))
    engine = EngineOptions(
        max_model_len=_MODEL_LEN, block_tokens=_BLOCK_TOKENS, threads=threads, emulated_step_ms=emulated_step_ms
    )
    return DeploymentConfig(
        checkpoint,
        workers=workers,
        name=f"elasticity-{os.getpid()}-{next(_numbers)}",
        device_memory_bytes=int(device_bytes),
        memory_mode="shared" if mode in ("shared", "emulated") else "separate",
        reserve_memory=mode.endswith("reserved"),
        rebalance_s=0,
        engine=engine,
    )


class Running:
    """A deployment that serves. Make it with `start`."""

    def __init__(self, config: DeploymentConfig) -> None:
        self.config = config
        self._least_s, self._most_s = -inf, inf  # between which monotonic seconds its uptime began
        self._controller: Any = launch(config)

    @classmethod
    async def start(cls, config: DeploymentConfig) -> Running:
        """Returns when it serves; ended again if it cannot."""
        running = cls(config)
        try:
            await running._call("start")
        except BaseException:
            await running.stop()
            raise
        return running

    def anew(self, workers: int) -> DeploymentConfig:
        """The same deployment with so many workers and another name."""
        return replace(self.config, workers=workers, name=f"elasticity-{os.getpid()}-{next(_numbers)}")

    async def status(self) -> DeploymentStatus:
        """Says its uptime too, by which times of operations become those of the monotonic clock."""
        asked_s = time.monotonic()
        status: DeploymentStatus = await self._call("status")
        self._least_s = max(self._least_s, asked_s - status.uptime_s)
        self._most_s = min(self._most_s, time.monotonic() - status.uptime_s)
        return status

    async def preview(self, workers: int) -> Preview:
        seen: Preview = await self._call("scale", self.config.token, workers, True)
        return seen

    async def ask(self, workers: int) -> OperationStatus:
        """Begin to scale."""
        operation: OperationStatus = await self._call("scale", self.config.token, workers)
        return operation

    async def scale(self, workers: int) -> Answer:
        """Scale, and wait for the operation's end."""
        asked_s = time.monotonic()
        operation = await self.ask(workers)
        return self.answer(await self.operation(operation.id, LIMIT_S), asked_s)

    def answer(self, operation: OperationStatus, asked_s: float) -> Answer:
        """Of an operation that has ended; `status` must have been asked for before."""
        began_s = (self._least_s + self._most_s) / 2
        return Answer(
            asked_s=asked_s,
            begun_s=began_s + operation.started_s,
            committed_s=began_s + operation.committed_s,
            ended_s=began_s + operation.ended_s,
            planned_bytes=operation.bytes_total,
        )

    async def operation(self, op_id: str, wait_s: float = 0.0) -> OperationStatus:
        """Raises `RuntimeError` if it did not end well."""
        status: OperationStatus = await self._call("operation", self.config.token, op_id, wait_s)
        if status.state != "done" and (wait_s or status.state != "running"):
            raise RuntimeError(f"operation {status.id}, {status.text}: {status.state} {status.phase} {status.reason}")
        return status

    async def settled(self, workers: int, after: int = 0) -> DeploymentStatus:
        """The deployment once it serves whole, with its standbys, in a generation behind number ``after``."""
        standbys = self.config.standbys
        pools = 1 if self.config.memory_mode == "shared" else 1 + workers + standbys
        async with asyncio.timeout(LIMIT_S):
            while True:
                status = await self.status()
                whole = [w.state for w in status.workers] == ["serving"] * workers and len(status.pools) == pools
                if status.phase == "serving" and whole and status.standbys == standbys and status.generation > after:
                    return status
                await asyncio.sleep(_POLL_S)

    async def step_ends_s(self, since_s: float) -> list[list[float]]:
        """When each worker's steps ended, in monotonic seconds; of workers that are there."""
        prefix = f"worker/{self.config.name}/"
        named = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        workers = [ray.get_actor(name, NAMESPACE) for name in named if name.startswith(prefix)]
        return list(await asyncio.gather(*(worker.step_ends_s.remote(since_s) for worker in workers)))

    async def stop(self) -> None:
        """End it; leaves nothing behind."""
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            await asyncio.wait_for(self._call("stop"), LIMIT_S)
        ray.kill(self._controller)
        await asyncio.to_thread(end_all, self.config.name)

    async def _call(self, method: str, *args: object) -> Any:
        try:
            return await asyncio.wait_for(getattr(self._controller, method).remote(*args), LIMIT_S + 10)
        except ray.exceptions.RayTaskError as e:
            raise e.cause from None


def moved_bytes(before: DeploymentStatus, after: DeploymentStatus) -> Mapping[str, int]:
    """Bytes of experts copied between pools and loaded from the checkpoint, and of KV copied, in between.

    A pool that is new began at 0, and so did a worker.
    """
    had = {worker.pid: worker.kv_copied_bytes for worker in before.workers}
    kv = sum(worker.kv_copied_bytes - had.get(worker.pid, 0) for worker in after.workers)
    moved = {"copied_bytes": 0, "loaded_bytes": 0, "kv_copied_bytes": kv}
    known = {pool.name: pool for pool in before.pools}
    for pool in after.pools:
        was = known.get(pool.name)
        moved["copied_bytes"] += pool.copied_bytes - (was.copied_bytes if was else 0)
        moved["loaded_bytes"] += pool.loaded_bytes - (was.loaded_bytes if was else 0)
    return moved
