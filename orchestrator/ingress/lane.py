"""One worker as the router sees it: its connection, kept up, and the work it was given."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from ...errors import ConcertinaError, PeerLost
from ...workers.protocol import EngineLoad, EngineOutput, EngineRequest
from .members import Connect, Member, WorkerClient

LOST = (PeerLost, OSError, EOFError)  # what a broken connection looks like
FIRST_RETRY_S, LAST_RETRY_S = 0.05, 2.0
CHECK_S = 0.5  # how soon a connection that broke while nothing ran on it is renewed
UNKNOWN_LENGTH = 256  # tokens that a request is taken for when it may run on to the end of the context

logger = logging.getLogger("concertina.ingress")


class Lane:
    """Connects to a member, again and again until it is closed, and counts its outstanding tokens.

    Parameters
    ----------
    member : Member
        Whom to connect to.
    connect : callable
        Makes a connection; raises `OSError` or a `ConcertinaError` when it cannot.
    changed : callable
        Called when a connection has come up.
    """

    def __init__(self, member: Member, connect: Connect, changed: Callable[[], None]) -> None:
        self.member = member
        self.sequences = 0
        self.outstanding = 0
        self._connect = connect
        self._changed = changed
        self._client: WorkerClient | None = None
        self._broken = asyncio.Event()
        self._task = asyncio.create_task(self._keep_up())

    @property
    def ready(self) -> bool:
        """Connected, and to be given new work."""
        return self.connected and not self.member.draining

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.connected

    @property
    def load(self) -> EngineLoad:
        """The engine's own last report; zeros without a connection."""
        return self._client.load if self._client is not None else EngineLoad()

    async def submit(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Outputs of a request; its tokens count as outstanding until they have come."""
        client = self._client
        if client is None:
            raise PeerLost(-1, f"worker {self.member.name} is not connected")
        left = len(request.prompt) + min(request.sampling.max_tokens, UNKNOWN_LENGTH)
        self.sequences += 1
        self.outstanding += left
        first = len(request.prompt)  # the first output says that the prompt is done
        try:
            async with aclosing(client.submit(request)) as outputs:
                async for output in outputs:
                    done = min(left, len(output.token_ids) + first)
                    self.outstanding -= done
                    left, first = left - done, 0
                    yield output
        except LOST as e:
            self._lost(client, e)
            raise
        finally:
            self.sequences -= 1
            self.outstanding -= left

    async def close(self) -> None:
        """Give the connection up; whatever runs on it raises."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    def _lost(self, client: WorkerClient, reason: BaseException) -> None:
        if client is self._client:  # else another sequence noticed first, or the lane is closed
            logger.warning("worker %s lost: %s", self.member.name, reason)
            self._client = None
            self._broken.set()

    async def _keep_up(self) -> None:
        while True:
            self._broken.clear()
            self._client = client = await self._connect_at_last()
            self._changed()
            while self._client is not None and client.connected:
                with suppress(TimeoutError):
                    async with asyncio.timeout(CHECK_S):  # wait_for may swallow a cancellation before Python 3.12
                        await self._broken.wait()
            self._lost(client, PeerLost(-1, "the connection ended"))
            await client.close()

    async def _connect_at_last(self) -> WorkerClient:
        pause_s = FIRST_RETRY_S
        while True:
            try:
                return await self._connect(self.member)
            except (OSError, ConcertinaError) as e:
                level = logging.WARNING if pause_s == FIRST_RETRY_S else logging.DEBUG
                where = f"{self.member.name} at {self.member.host}:{self.member.port}"
                logger.log(level, "worker %s: %s; trying again", where, e)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_RETRY_S)
