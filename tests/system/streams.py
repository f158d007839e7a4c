"""Greedy streams that never stop, through a router that follows a deployment's controller as the ingress does."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from concertina.orchestrator.config import NAMESPACE
from concertina.orchestrator.ingress.deployment import ActorMembers
from concertina.orchestrator.ingress.following import follow
from concertina.orchestrator.ingress.members import Member, WorkerClient, connect_worker
from concertina.orchestrator.ingress.router import Router
from concertina.orchestrator.remote import controller_name
from concertina.workers.protocol import EngineLoad, EngineOutput, EngineRequest, SamplingParams

PROMPTS = [tuple((7 * k + i) % 250 for i in range(20 + 9 * k)) for k in range(6)]
TOKENS = 200
LENGTH = 300  # of the longest prompt with its tokens, and some room
LIMIT_S = 60.0


@dataclass(frozen=True)
class Resumed:
    """A sequence that went on at a device: its tokens so far, and how many of them that one had already."""

    device: str
    tokens: int
    cached: int


class Noting:
    """A connection that notes which sequences went on there."""

    def __init__(self, client: WorkerClient, device: str, note: Callable[[Resumed], None]) -> None:
        self._client, self._device, self._note = client, device, note

    @property
    def connected(self) -> bool:
        return self._client.connected

    @property
    def load(self) -> EngineLoad:
        return self._client.load

    async def submit(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        first = "." in request.id  # how `Continuation` calls what is not the first attempt
        async with aclosing(self._client.submit(request)) as outputs:
            async for output in outputs:
                if first and output.token_ids:
                    self._note(Resumed(self._device, len(request.prompt), output.cached_tokens))
                    first = False
                yield output

    async def close(self) -> None:
        await self._client.close()


@dataclass
class Streams:
    """Each prompt again and again; its tokens must be those of the first time.

    ``resumed`` are sequences that went on elsewhere; ``silent_s`` the longest that a stream was without a token.
    """

    finished: int = 0
    resumed: list[Resumed] = field(default_factory=list)
    silent_s: float = 0.0
    _router: Router = field(init=False)
    _reference: list[list[int]] = field(default_factory=list)
    _clients: list[asyncio.Task[None]] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _streaming: bool = True

    @classmethod
    @asynccontextmanager
    async def of(cls, deployment: str, token: str) -> AsyncIterator[Streams]:
        """Streams through a deployment of this cluster; at the end each prompt is answered once more."""
        streams = cls()
        streams._router = Router(streams._connect)
        source = ActorMembers(controller_name(deployment), NAMESPACE, token)
        following = asyncio.create_task(follow(streams._router, source))
        try:
            streams._reference = [await streams._answer(k) for k in range(len(PROMPTS))]
            streams._clients = [asyncio.create_task(streams._client(k)) for k in range(len(PROMPTS))]
            yield streams
            await streams.more(len(PROMPTS))
            streams._streaming = False
            await asyncio.wait_for(asyncio.gather(*streams._clients), LIMIT_S)
        finally:
            for task in (following, *streams._clients):
                task.cancel()
            await asyncio.gather(following, *streams._clients, return_exceptions=True)
            await streams._router.close()

    async def more(self, answers: int) -> None:
        """Wait for so many more of them."""
        until = self.finished + answers
        await self.until(lambda: self.finished >= until)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something, and fail as soon as a stream does."""
        async with asyncio.timeout(LIMIT_S):
            while not holds():
                for client in self._clients:
                    if client.done():
                        client.result()
                await asyncio.sleep(0.02)

    def clear(self) -> None:
        """Begin to note anew."""
        self.resumed.clear()
        self.silent_s = 0.0

    async def _connect(self, member: Member) -> WorkerClient:
        return Noting(await connect_worker(member), member.device, self.resumed.append)

    async def _answer(self, k: int) -> list[int]:
        sampling = SamplingParams(TOKENS, temperature=0.0, ignore_eos=True)
        request = EngineRequest(f"r{next(self._numbers)}", PROMPTS[k], sampling)
        tokens: list[int] = []
        last_s = time.monotonic()
        async for output in self._router.stream(request):
            tokens += output.token_ids
            self.silent_s, last_s = max(self.silent_s, time.monotonic() - last_s), time.monotonic()
        return tokens

    async def _client(self, k: int) -> None:
        while self._streaming:
            assert await self._answer(k) == self._reference[k], f"prompt {k}"
            self.finished += 1
