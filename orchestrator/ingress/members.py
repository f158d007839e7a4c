"""The workers that an ingress knows of, and what it needs of a connection to one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ...errors import InternalError, OperatorError
from ...workers import client
from ...workers.protocol import EngineLoad, EngineOutput, EngineRequest


@dataclass(frozen=True, slots=True)
class Member:
    """A worker's address.

    Parameters
    ----------
    name : str
        Unique; a worker that replaces another one is another member.
    host, port, token
        Where its engine listens, and the secret that it asks for.
    speed : float
        Tokens per second relative to the other members'; requests are shared out accordingly.
    draining : bool
        Gets no new request; those that run there go on.
    device : str
        Whose KV it has. A worker that replaces another one on a device finds there what that one computed. Left
        empty, a device of its own, called like itself.

    Raises
    ------
    OperatorError
        The speed is not positive.
    """

    name: str
    host: str
    port: int
    token: str = field(default="", repr=False)
    speed: float = 1.0
    draining: bool = False
    device: str = ""

    def __post_init__(self) -> None:
        if not self.device:
            object.__setattr__(self, "device", self.name)
        if not self.speed > 0:
            raise OperatorError(f"ingress: member {self.name}: speed: {self.speed!r}: expected more than 0")


@dataclass(frozen=True, slots=True)
class Roster:
    """Who takes requests at one moment; ``awaited`` and ``heirs`` as in `MemberList`."""

    members: tuple[Member, ...] = ()
    awaited: frozenset[str] = frozenset()
    heirs: Mapping[str, str] = field(default_factory=dict)


class WorkerClient(Protocol):
    """A connection to one worker's engine."""

    @property
    def connected(self) -> bool:
        """Whether the connection is still up, as far as is known."""

    @property
    def load(self) -> EngineLoad:
        """The engine's own last report."""

    def submit(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Outputs up to the one with a finish reason. Closing the generator earlier aborts the sequence.

        Raises
        ------
        PeerLost or OSError
            The connection ended, also through `close`.
        RequestRefused
            The engine does not take the request.
        """

    async def close(self) -> None:
        """End the connection; whatever runs on it raises."""


Connect = Callable[[Member], Awaitable[WorkerClient]]
MemberSource = Callable[[], AsyncIterator[Roster]]


async def connect_worker(member: Member) -> WorkerClient:
    """A `Connect` over TCP.

    Raises
    ------
    OSError, OperatorError, PeerLost
        Nobody answers, the token is wrong, or the worker hung up.
    """
    return await client.WorkerClient.connect(member.host, member.port, member.token)


class NoWorker(InternalError):
    """No worker was connected for as long as a request may wait."""


class StreamLost(InternalError):
    """A running sequence lost its worker, and no other one took it over in time."""


class WorkerLost(InternalError):
    """A sequence's connection to its worker ended.

    Parameters
    ----------
    reason : str
    computing : bool
        The worker was probably computing its prompt, so that the sequence itself may be what kills workers. False where
        it had tokens already, or still waited for its turn.
    """

    def __init__(self, reason: str, computing: bool) -> None:
        super().__init__(reason, computing)
        self.reason = reason
        self.computing = computing

    def __str__(self) -> str:
        return self.reason
