"""Clients that never stop: greedy streams through the ingress's own router, and when each token came."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import aclosing, suppress

from concertina.errors import ConcertinaError
from concertina.orchestrator.config import NAMESPACE, DeploymentConfig
from concertina.orchestrator.ingress.deployment import ActorMembers
from concertina.orchestrator.ingress.following import follow
from concertina.orchestrator.ingress.members import connect_worker
from concertina.orchestrator.ingress.router import Router
from concertina.orchestrator.remote import controller_name
from concertina.workers.protocol import EngineRequest, SamplingParams

PROMPT_TOKENS = 32
LEAST_TOKENS, MORE_TOKENS = 64, 8  # answers differ in length, so that clients do not begin together
_PAUSE_S = 0.1  # after a stream that failed
_numbers = itertools.count()


class Load:
    """Each client asks for one prompt of its own again and again, and must get the same tokens each time.

    Attributes
    ----------
    arrivals : list of (float, int, int)
        Monotonic seconds, client, tokens.
    failed, changed, finished : int
        Streams that ended with an error, with other tokens than their first answer, and well.
    """

    def __init__(self, config: DeploymentConfig, clients: int, vocabulary: int) -> None:
        self.router = Router(connect_worker)
        self.arrivals: list[tuple[float, int, int]] = []
        self.failed = self.changed = self.finished = 0
        self._vocabulary = vocabulary
        self._known: dict[int, list[int]] = {}
        self._ending = False
        members = ActorMembers(controller_name(config.name), NAMESPACE, config.token)
        self._following = asyncio.create_task(follow(self.router, members))
        self._clients = [asyncio.create_task(self._client(k)) for k in range(clients)]

    async def first_token_s(self, limit_s: float) -> float:
        """When the first token came."""
        async with asyncio.timeout(limit_s):
            while not self.arrivals:
                await asyncio.sleep(0.005)
        return self.arrivals[0][0]

    async def everyone(self, answers: int, limit_s: float) -> None:
        """Return once so many further streams have ended."""
        goal = self.finished + answers
        async with asyncio.timeout(limit_s):
            while self.finished < goal:
                await asyncio.sleep(0.05)

    async def drain(self, limit_s: float) -> None:
        """Let running streams end and ask for no more."""
        self._ending = True
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await asyncio.gather(*self._clients)

    async def close(self) -> None:
        """End at once; streams that run are given up and count as nothing."""
        for task in (*self._clients, self._following):
            task.cancel()
        await asyncio.gather(*self._clients, self._following, return_exceptions=True)
        await self.router.close()

    async def _client(self, k: int) -> None:
        prompt = tuple((7 * k + 3 * i) % (self._vocabulary - 4) + 4 for i in range(PROMPT_TOKENS))
        sampling = SamplingParams(LEAST_TOKENS + MORE_TOKENS * k, temperature=0.0, ignore_eos=True)
        while not self._ending:
            request = EngineRequest(f"e{next(_numbers)}", prompt, sampling)
            try:
                tokens = await self._answer(k, request)
            except (ConcertinaError, OSError) as e:
                print(f"client {k}: {e}", flush=True)
                self.failed += 1
                await asyncio.sleep(_PAUSE_S)
                continue
            self.changed += self._known.setdefault(k, tokens) != tokens
            self.finished += 1

    async def _answer(self, k: int, request: EngineRequest) -> list[int]:
        tokens: list[int] = []
        async with aclosing(self.router.stream(request)) as outputs:
            async for output in outputs:
                if output.token_ids:
                    self.arrivals.append((time.monotonic(), k, len(output.token_ids)))
                    tokens += output.token_ids
        return tokens
