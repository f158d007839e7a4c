"""One worker as the router sees it: its connection, kept up, and the work it was given."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from ...errors import ConcertinaError, PeerLost
from ...workers.protocol import EngineLoad, EngineOutput, EngineRequest
from .members import Connect, Member, WorkerClient, WorkerLost

LOST = (PeerLost, OSError, EOFError)  # what a broken connection looks like
FIRST_RETRY_S, LAST_RETRY_S = 0.05, 0.5
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

    Attributes
    ----------
    born_s, ready_s : float
        When it was made, and when it was last seen ready (by the event loop's clock).
    """

    def __init__(self, member: Member, connect: Connect, changed: Callable[[], None]) -> None:
        self.member = member
        self.sequences = 0
        self.outstanding = 0
        self.born_s, self.ready_s = _now_s(), -math.inf
        self._connect = connect
        self._changed = changed
        self._client: WorkerClient | None = None
        self._closing = False
        self._broken = asyncio.Event()
        self._idle = asyncio.Event()
        self._tickets = itertools.count()
        self._unanswered: dict[int, bool] = {}  # sequences without a token, by arrival, and whether they are resumed
        self._computing: frozenset[int] = frozenset()  # of those, as the connection broke
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
        """Outputs of a request; its tokens count as outstanding until they have come.

        Raises
        ------
        WorkerLost
            The connection ended.
        RequestRefused
            The engine does not take the request.
        """
        client = self._client
        if client is None:
            raise WorkerLost(f"worker {self.member.name} is not connected", False)
        ticket = self._enter(request.resumed)
        left = len(request.prompt) + min(request.sampling.max_tokens, UNKNOWN_LENGTH)
        self.outstanding += left
        first = len(request.prompt)  # the first output says that the prompt is done
        try:
            async with aclosing(client.submit(request)) as outputs:
                async for output in outputs:
                    self._unanswered.pop(ticket, None)
                    done = min(left, len(output.token_ids) + first)
                    self.outstanding -= done
                    left, first = left - done, 0
                    yield output
        except LOST as e:
            self._lost(client, e)
            raise WorkerLost(str(e), ticket in self._computing) from e
        finally:
            self.outstanding -= left
            self._leave(ticket)

    async def close(self, linger_s: float = 0.0) -> None:
        """Give the connection up once nothing runs on it, or after ``linger_s``; what still runs then raises."""
        self._closing = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if linger_s and self.sequences:
            with suppress(TimeoutError):
                async with asyncio.timeout(linger_s):
                    await self._idle.wait()
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()
        self._idle.set()  # whoever lingers need not wait for readers that have not looked yet

    def _enter(self, resumed: bool) -> int:
        ticket = next(self._tickets)
        self._unanswered[ticket] = resumed
        self.sequences += 1
        self._idle.clear()
        return ticket

    def _leave(self, ticket: int) -> None:
        self._unanswered.pop(ticket, None)
        self.sequences -= 1
        if not self.sequences:
            self._idle.set()

    def _lost(self, client: WorkerClient, reason: BaseException) -> None:
        if client is not self._client:  # another sequence noticed first, or the lane is closed
            return
        logger.warning("worker %s lost: %s", self.member.name, reason)
        # Engines take their sequences in the order of arrival, resumed ones first, so that those that wait are our last
        # ones, but for prompts that were begun before a resumed one came. With other ingresses beside us some of them
        # are not ours: then too few of ours count as being computed, never too many.
        began = max(0, len(self._unanswered) - client.load.waiting)
        in_turn = sorted(self._unanswered, key=lambda ticket: not self._unanswered[ticket])
        self._computing = frozenset() if self._closing else frozenset(in_turn[:began])
        self._client = None
        self._broken.set()

    async def _keep_up(self) -> None:
        while True:
            self._broken.clear()
            self._client = client = await self._connect_at_last()
            self._changed()
            while self._client is not None and client.connected:
                self.ready_s = _now_s() if self.ready else self.ready_s
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


def _now_s() -> float:
    return asyncio.get_running_loop().time()
