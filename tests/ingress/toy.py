"""Toy workers behind the ingress's own `WorkerClient` seam, and a real HTTP server in front of them."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvicorn
from concertina.errors import PeerLost
from concertina.orchestrator.ingress.app import create_app
from concertina.orchestrator.ingress.members import Connect, Member
from concertina.orchestrator.ingress.router import Router
from concertina.orchestrator.ingress.settings import IngressSettings
from concertina.workers.frontend import Frontend
from concertina.workers.protocol import EngineLoad, EngineOutput, EngineRequest, TokenLogprob

T = TypeVar("T")
EOS = 1

Script = Callable[[Sequence[int], int], int]


def walk(tokens: Sequence[int], seed: int) -> int:
    """What a toy model says after these tokens: depends on all of them, on the seed, and is never special."""
    return 3 + (sum((i + 1) * t for i, t in enumerate(tokens)) + 7 * seed) % 250


def saying(ids: Sequence[int], prompt_len: int) -> Script:
    """Says ``ids`` one by one, then ends."""
    return lambda tokens, _: ids[len(tokens) - prompt_len] if len(tokens) - prompt_len < len(ids) else EOS


@dataclass
class ToyWorker:
    """An engine without a model. Fields may be changed while it runs.

    ``gate``: outputs wait for it. ``die_after``: connections break after so many outputs in all. ``batch``: tokens per
    output. ``moved_to``: it hands its sequences over to that device. ``on_death``: called when ``die_after`` is over.
    """

    name: str = "w0"
    script: Script = walk
    batch: int = 1
    step_s: float = 0.0
    die_after: int | None = None
    refuse: Exception | None = None
    error: str | None = None
    give_up_after: int | None = None
    cached_tokens: int = 0
    down: bool = False
    moved_to: str | None = None
    on_death: Callable[[], None] = lambda: None
    device: str = ""
    connect_s: float = 0.0
    load: EngineLoad = field(default_factory=lambda: EngineLoad(2, 3, 4, 5))
    clients: list[ToyClient] = field(default_factory=list)
    stirred: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[EngineRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    outputs: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def member(self) -> Member:
        return Member(self.name, "toy", 1, device=self.device)

    def kill(self) -> None:
        """Break all connections at once, even those that the gate holds."""
        self.down = True
        self.stirred.set()

    def hand_over(self, device: str) -> None:
        """End all sequences, those that the gate holds too and those to come, as moved to ``device``."""
        self.moved_to = device
        self.stirred.set()

    def cut(self) -> None:
        """Break all connections; new ones can be made."""
        for client in self.clients:
            client.closed.set()


class ToyClient:
    """One connection to a toy worker."""

    def __init__(self, worker: ToyWorker) -> None:
        self.worker = worker
        self.closed = asyncio.Event()
        worker.clients.append(self)

    @property
    def connected(self) -> bool:
        return not self.worker.down and not self.closed.is_set()

    @property
    def load(self) -> EngineLoad:
        return self.worker.load

    async def submit(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        worker, done = self.worker, False
        worker.requests.append(request)
        if worker.refuse is not None:
            raise worker.refuse
        try:
            async for output in self._generate(request):
                done = output.finish_reason is not None
                yield output
        finally:
            if not done:
                worker.aborted.append(request.id)

    async def close(self) -> None:
        self.closed.set()

    async def _generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        worker, sampling = self.worker, request.sampling
        tokens, finish = list(request.prompt), None
        while finish is None:
            await self._step()
            if worker.moved_to is not None:
                yield EngineOutput(request.id, (), "moved", moved_to=worker.moved_to)
                return
            if worker.error is not None:
                yield EngineOutput(request.id, (), "error", error=worker.error)
                return
            made = len(tokens) - len(request.prompt)
            if worker.give_up_after is not None and made >= worker.give_up_after:
                yield EngineOutput(request.id, (), "abort")
                return
            new: list[int] = []
            while len(new) < worker.batch and finish is None:
                new.append(worker.script(tokens, sampling.seed or 0))
                tokens.append(new[-1])
                stops = {*sampling.stop_token_ids} | (set() if sampling.ignore_eos else {EOS})
                if new[-1] in stops and made + len(new) > sampling.min_tokens:
                    finish = "stop"
                elif made + len(new) >= sampling.max_tokens:
                    finish = "length"
            logprobs = tuple(_logprob(t, sampling.logprobs) for t in new) if sampling.logprobs is not None else ()
            yield EngineOutput(request.id, tuple(new), finish, logprobs, worker.cached_tokens)

    async def _step(self) -> None:
        worker = self.worker
        await asyncio.sleep(worker.step_s)
        events = (worker.gate, worker.stirred, self.closed)
        waits = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        worker.outputs += 1
        if worker.die_after is not None and worker.outputs > worker.die_after:
            worker.down = True
            worker.on_death()
        if worker.down or self.closed.is_set():
            raise PeerLost(-1, "connection closed")


def _logprob(token: int, k: int) -> TokenLogprob:
    return TokenLogprob(-0.5, tuple((token + i, -0.5 - i) for i in range(k)))


def connect_to(workers: Sequence[ToyWorker]) -> Callable[[Member], Awaitable[ToyClient]]:
    """A `Connect` that finds toy workers by name."""

    async def connect(member: Member) -> ToyClient:
        worker = next(w for w in workers if w.name == member.name)
        if worker.down:
            raise ConnectionRefusedError("down")
        await asyncio.sleep(worker.connect_s)
        return ToyClient(worker)

    return connect


class Front:
    """The application under uvicorn on a free loopback port, in a thread with its own event loop."""

    def __init__(self, settings: IngressSettings, workers: Sequence[ToyWorker], connect: Connect | None = None) -> None:
        self.workers = list(workers)
        self.router = Router(connect or connect_to(self.workers), settings.worker_wait_s, settings.recovery_timeout_s)
        self.app = create_app(settings, self.router)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(self.app, log_level="error", lifespan="on", timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Front:
        self._thread.start()
        assert self._up.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._socket.close()
        assert not self._thread.is_alive()

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in the server's event loop."""

        async def call() -> T:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(20)

    def until(self, condition: Callable[[], bool], timeout_s: float = 20) -> None:
        """Wait until the server's loop sees the condition hold."""

        async def wait() -> None:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await asyncio.sleep(0.005)

        asyncio.run_coroutine_threadsafe(wait(), self._loop).result(timeout_s + 5)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.router.update([w.member for w in self.workers])
        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.005)
        self._up.set()
        await serving


class ToyEngine:
    """An `EngineDoor` in a thread: the toy model behind a worker's real frontend."""

    def __init__(self) -> None:
        self.requests: list[EngineRequest] = []
        self.aborted: set[str] = set()
        self._moved_to = ""
        self._inbox: queue.Queue[EngineRequest | None] = queue.Queue()
        self._running: dict[str, tuple[EngineRequest, list[int]]] = {}
        self.frontend = Frontend(self, "127.0.0.1", 0, "secret")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(running=len(self._running))

    def submit(self, request: EngineRequest) -> None:
        self.requests.append(request)
        self._inbox.put(request)

    def abort(self, request_id: str) -> None:
        self.aborted.add(request_id)

    def hand_over(self, device: str) -> None:
        """End what runs as moved to ``device``."""
        self._moved_to = device

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join(20)
        self.frontend.close()

    def _run(self) -> None:
        while self._take():
            outputs = [self._step(name, *state) for name, state in list(self._running.items())]
            self.frontend.emit(outputs)
            if moved_to := self._moved_to:
                self._moved_to = ""
                self.frontend.emit([EngineOutput(name, (), "moved", moved_to=moved_to) for name in self._running])
                self._running.clear()
            threading.Event().wait(0.002)

    def _take(self) -> bool:
        while not self._running or not self._inbox.empty():
            request = self._inbox.get()
            if request is None:
                return False
            self._running[request.id] = (request, list(request.prompt))
        return True

    def _step(self, name: str, request: EngineRequest, tokens: list[int]) -> EngineOutput:
        tokens.append(walk(tokens, request.sampling.seed or 0))
        ended = len(tokens) - len(request.prompt) >= request.sampling.max_tokens
        if ended or name in self.aborted:
            del self._running[name]
        return EngineOutput(name, (tokens[-1],), "length" if ended else None)
