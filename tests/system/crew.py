"""The real controller over worker processes that outlive many deployments, without Ray."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from concertina.errors import ConcertinaError
from concertina.orchestrator.config import DeploymentConfig
from concertina.orchestrator.controller import Controller
from concertina.orchestrator.hands import NodeInfo, OwnerHandle, WorkerHandle
from concertina.workers.client import WorkerClient
from concertina.workers.owner import OwnerConfig
from concertina.workers.roles import WorkerConfig
from concertina.workers.services import OwnerService

ROOT = Path(__file__).parents[2]
ANSWER_S = 120.0
START_S = 60.0
_numbers = itertools.count(1)


class Member:
    """One process of `tests.system.member`."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.system.member", str(theirs.fileno())]
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()])
        theirs.close()
        self._lock = threading.Lock()

    def call(self, name: str, *args: Any) -> Any:
        """The answer; an error of ours is raised as it was there."""
        with self._lock:
            self._pipe.send((name, args))
            assert self._pipe.poll(ANSWER_S), f"{name}: no answer for {ANSWER_S} s"
            answer = self._pipe.recv()
        if isinstance(answer, ConcertinaError):
            raise answer
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()


class _Handle:
    """Methods of an object, or of a worker in a member process, as coroutines."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: asyncio.to_thread(self._call, name, *args)


class ProcessHands:
    """`Hands` whose workers are members and whose owners live in this process."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._idle = list(members)
        self._owners: list[OwnerService] = []
        self._store: dist.TCPStore | None = None

    async def nodes(self) -> list[NodeInfo]:
        return [NodeInfo("here", "127.0.0.1", 2, 1 << 30)]

    async def start_owner(self, node: str, config: OwnerConfig) -> OwnerHandle:
        owner = OwnerService(config)
        self._owners.append(owner)
        return cast(OwnerHandle, _Handle(lambda name, *args: getattr(owner, name)(*args)))

    async def start_worker(self, node: str, config: WorkerConfig) -> WorkerHandle:
        member = self._idle.pop()
        await asyncio.to_thread(member.call, "hire", config)
        return cast(WorkerHandle, _Handle(member.call))

    async def open_store(self) -> tuple[str, int]:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return "127.0.0.1", self._store.port

    def now_s(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        for owner in self._owners:
            owner._owner.close()


@dataclass(frozen=True)
class Deployment:
    """What serves: its controller, and a connection to every worker by rank."""

    controller: Controller
    clients: list[WorkerClient]


@asynccontextmanager
async def deployed(members: Sequence[Member], checkpoint: Path, **fields: Any) -> AsyncIterator[Deployment]:
    """A deployment of the checkpoint; ``fields`` are those of `DeploymentConfig`."""
    config = DeploymentConfig(str(checkpoint), name=f"test-{os.getpid()}-{next(_numbers)}", **fields)
    hands = ProcessHands(members)
    controller = Controller(config, hands)
    try:
        async with AsyncExitStack() as stack:
            await asyncio.wait_for(controller.start(), START_S)
            clients = []
            for address in controller.members():
                client = await WorkerClient.connect(address.host, address.port, config.token)
                stack.push_async_callback(client.close)
                clients.append(client)
            yield Deployment(controller, clients)
    finally:
        await controller.stop()
        hands.close()
