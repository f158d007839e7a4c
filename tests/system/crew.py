"""The real controller over worker processes that outlive many deployments, without Ray."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, ClassVar, cast

import torch.distributed as dist
from concertina.errors import ConcertinaError, InternalError
from concertina.orchestrator.config import DeploymentConfig
from concertina.orchestrator.controller import Controller
from concertina.orchestrator.hands import Existing, NodeInfo, OwnerHandle, WorkerHandle
from concertina.workers.client import WorkerClient
from concertina.workers.owner_roles import OwnerConfig
from concertina.workers.roles import WorkerConfig
from concertina.workers.services import OwnerService

ROOT = Path(__file__).parents[2]
ANSWER_S = 120.0
START_S = 60.0
STOP_S = 5.0
_numbers = itertools.count(1)


class Member:
    """One process of `tests.system.member`. Calls may come from many threads. ``all`` are those ever started."""

    all: ClassVar[list[Member]] = []

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.system.member", str(theirs.fileno())]
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()])
        theirs.close()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._answers: dict[int, Future[Any]] = {}
        self._ended = False
        self.all.append(self)
        threading.Thread(target=self._read, daemon=True).start()

    def call(self, name: str, *args: Any, limit_s: float = ANSWER_S) -> Any:
        """The answer; an error of ours is raised as it was there, and `InternalError` once the process has ended."""
        return self.ask(name, *args).result(limit_s)

    def ask(self, name: str, *args: Any) -> Future[Any]:
        """Call without waiting."""
        answer: Future[Any] = Future()
        with self._lock:
            if self._ended:
                answer.set_exception(InternalError("its process ended"))
                return answer
            number = next(self._numbers)
            self._answers[number] = answer
            with suppress(OSError):  # its end is being noticed
                self._pipe.send((number, name, args))
        return answer

    @property
    def runs(self) -> bool:
        """Whether it has not ended and is not stopped."""
        if self.process.poll() is not None:
            return False
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TZ"

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.kill()
        self._pipe.close()

    def _read(self) -> None:
        with suppress(EOFError, OSError, TypeError):
            while True:
                number, answer = self._pipe.recv()
                _tell(self._answers.pop(number), answer)
        with self._lock:
            self._ended = True
        for left in self._answers.values():
            _tell(left, InternalError("its process ended"))


def _tell(asked: Future[Any], answer: Any) -> None:
    """Nobody may be waiting any more."""
    if not asked.set_running_or_notify_cancel():
        return
    if isinstance(answer, ConcertinaError):
        asked.set_exception(answer)
    else:
        asked.set_result(answer)


class _Handle:
    """Methods behind a call that gives a future, as coroutines."""

    def __init__(self, ask: Callable[..., Future[Any]]) -> None:
        self._ask = ask

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any) -> Any:
            return await asyncio.wrap_future(self._ask(name, *args))

        return call


class ProcessHands:
    """`Hands` whose workers are members and whose owners live in this process. Spare members are standbys."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.idle = list(members)
        self.owners: dict[str, OwnerService] = {}
        self.hung: set[OwnerService] = set()  # owners that give no answer any more
        self.workers: dict[str, Member] = {}
        self.state: bytes | None = None
        self.model: bytes | None = None
        self._store: dist.TCPStore | None = None
        self._threads = ThreadPoolExecutor(32)  # some calls wait for long

    async def nodes(self, *, anew: bool = False) -> list[NodeInfo]:
        return [NodeInfo("here", "127.0.0.1", 2, 1 << 30)]

    async def start_owner(self, node: str, config: OwnerConfig, adopt_from: str | None = None) -> OwnerHandle:
        self.owners[config.name] = owner = await asyncio.to_thread(OwnerService, config, adopt_from)
        return self.owner_handle(config.name, owner)

    def owner_handle(self, name: str, owner: OwnerService) -> OwnerHandle:
        def call(method: str, *args: Any) -> Any:
            if method == "wait":
                end_s = time.monotonic() + args[0]
                while self.owners.get(name) is owner and time.monotonic() < end_s:
                    time.sleep(0.01)
            while owner in self.hung and self.owners.get(name) is owner:
                time.sleep(0.01)
            if self.owners.get(name) is not owner:
                raise InternalError(f"memory owner {name}: its process ended")
            return None if method == "wait" else getattr(owner, method)(*args)

        return cast(OwnerHandle, _Handle(functools.partial(self._threads.submit, call)))

    async def start_worker(self, node: str, config: WorkerConfig) -> WorkerHandle:
        member = self.idle.pop() if self.idle else Member()
        await asyncio.to_thread(member.call, "hire", config)
        self.workers[config.name] = member
        return cast(WorkerHandle, _Handle(member.ask))

    async def existing(self) -> Existing:
        owners = {name: self.owner_handle(name, owner) for name, owner in self.owners.items()}
        workers = {n: ("here", cast(WorkerHandle, _Handle(m.ask))) for n, m in self.workers.items()}
        return Existing(owners, workers)

    async def begun(self, name: str) -> bool:
        return True

    async def kill(self, name: str) -> None:
        """A process that can end its worker is used again; one that cannot is killed."""
        member = self.workers.pop(name, None)
        if member is not None:
            try:
                await asyncio.to_thread(member.call, "stop", limit_s=STOP_S if member.runs else 0.0)
                self.idle.append(member)
            except (InternalError, FutureTimeout):
                await asyncio.to_thread(member.kill)
        owner = self.owners.pop(name, None)
        if owner is not None:
            owner._owner.close()

    async def open_store(self) -> tuple[str, int]:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return "127.0.0.1", self._store.port

    async def save(self, state: bytes) -> None:
        self.state = state

    async def load(self) -> bytes | None:
        return self.state

    async def keep(self, model: bytes) -> None:
        self.model = model

    async def kept(self) -> bytes | None:
        return self.model

    async def forget(self) -> None:
        self.state = None

    def now_s(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        for owner in self.owners.values():
            owner._owner.close()


@dataclass
class Deployment:
    """What serves: its controller, what it starts processes with, and a connection to every worker by rank."""

    controller: Controller
    hands: ProcessHands
    clients: list[WorkerClient]


@asynccontextmanager
async def deployed(members: Sequence[Member], checkpoint: Path, **fields: Any) -> AsyncIterator[Deployment]:
    """A deployment of the checkpoint; ``fields`` are those of `DeploymentConfig`."""
    options = {"standbys": 0, **fields}
    config = DeploymentConfig(str(checkpoint), name=f"test-{os.getpid()}-{next(_numbers)}", **options)
    hands = ProcessHands(members)
    deployment = Deployment(Controller(config, hands), hands, [])
    try:
        async with AsyncExitStack() as stack:
            await asyncio.wait_for(deployment.controller.start(), START_S)
            for address in (await deployment.controller.members()).workers:
                client = await WorkerClient.connect(address.host, address.port, config.token)
                stack.push_async_callback(client.close)
                deployment.clients.append(client)
            yield deployment
    finally:
        await deployment.controller.stop()
        hands.close()


async def restart(deployment: Deployment) -> None:
    """The controller's process dies, and another one takes its place; calls to other processes go on without it."""
    first = deployment.controller
    assert first._loop is not None
    first._cluster.close()
    for task in (first._loop, *first._under_way.tasks.values(), *([first._planning] if first._planning else [])):
        task.cancel()
    deployment.controller = second = Controller(first._config, deployment.hands)
    await second.resume()
