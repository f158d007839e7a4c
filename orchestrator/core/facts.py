"""What the shell sees (`Snapshot`) and what it may do (`Effect`): plain values without behaviour.

Every effect is idempotent: doing it twice, or again after a restart, ends in the same place. An effect under way is in
`Snapshot.busy`; one that failed is in `Snapshot.errors` until the state has taken note of it. The state must be durable
before any effect that it led to is started.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...workers.pages.table import ExtentRequest


@dataclass(frozen=True, slots=True)
class PoolFact:
    """A memory owner whose process lives: where its pool is handed out, and the finished extents in it.

    ``failed`` says why it has to be ended: it gives no answer. ``stale``: it has not answered since before
    this snapshot was asked for.
    """

    node: str
    address: str
    pages: Mapping[str, tuple[int, ...]]
    failed: str = ""
    stale: bool = False


@dataclass(frozen=True, slots=True)
class WorkerFact:
    """A worker whose process lives.

    Parameters
    ----------
    node : str
    prepared : frozenset of int
        Generations it could switch to.
    serving : int
        The generation it runs, or is parked in; 0 is none.
    parked : str
        Why its engine stopped, with all sequences, and waits for another generation; empty while it runs.
    retired : int
        The generation at whose coming it left; its sequences wait to be handed over. 0 is none.
    device, kv_blocks
        Whose KV cache it has mapped, and how many blocks of it.
    failed : str
        Why it cannot go on and has to be ended: it failed, hangs, or gives no answer.
    stale : bool
        It has not answered since this snapshot was asked for.
    joining : frozenset of int
        Generations that it is preparing, but for those that it was told to abandon.
    abandoned : int
        The latest generation that it was told to abandon; 0 is none.
    """

    node: str
    prepared: frozenset[int] = frozenset()
    serving: int = 0
    parked: str = ""
    retired: int = 0
    device: str = ""
    kv_blocks: int = 0
    failed: str = ""
    stale: bool = False
    joining: frozenset[int] = frozenset()
    abandoned: int = 0

    @property
    def idle(self) -> bool:
        """A standby: it has no role, and none is being given to it."""
        return not (self.prepared or self.joining or self.serving or self.retired or self.failed or self.device)


@dataclass(frozen=True, slots=True)
class StartOwner:
    """Start a memory owner: one that takes the pool over from a worker that maps it, else one with an empty pool."""

    pool: str
    node: str
    pages: int


@dataclass(frozen=True, slots=True)
class StopOwner:
    """End an owner: one whose pool holds nothing, or one that gives no answer. Who maps the pool keeps it."""

    pool: str


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker without a role."""

    worker: str
    node: str


@dataclass(frozen=True, slots=True)
class Fill:
    """Allocate what is missing of these extents; weights come from a peer that has them, else from the checkpoint."""

    pool: str
    requests: tuple[ExtentRequest, ...]


@dataclass(frozen=True, slots=True)
class OpenStore:
    """Open the store at which the members of process groups meet."""


@dataclass(frozen=True, slots=True)
class ResizeKV:
    """Give a worker's KV cache so many blocks, at a step boundary of its own; extent and mapping agree afterwards."""

    worker: str
    blocks: int


@dataclass(frozen=True, slots=True)
class Prepare:
    """Map the pages of a generation and join its exchange, beside whatever runs. All its extents must be there."""

    worker: str
    generation: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Switch to a generation at the next common boundary; at once if idle or parked. All must have prepared it."""

    worker: str
    generation: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """Take back the offer of a generation and let go of it, unless the switch has happened.

    Who is preparing it goes on for a while, and then lets go of it, without having touched its exchange.
    """

    worker: str
    generation: int


@dataclass(frozen=True, slots=True)
class Park:
    """Stop in a generation that has lost a member, which may not show in its exchange. One that has come to another
    generation goes on."""

    worker: str
    generation: int


@dataclass(frozen=True, slots=True)
class HandOver:
    """Let ``heir`` take over the KV of a device that no generation has any more, then free the rest of it.

    The worker that had it, if it lives, sends its clients there. Without an heir they go where they like.
    """

    device: str
    pool: str
    heir: str


@dataclass(frozen=True, slots=True)
class StopWorker:
    """End a worker that no generation needs, or that failed."""

    worker: str


@dataclass(frozen=True, slots=True)
class Free:
    """Give back extents that no generation needs. Nobody may map them any more."""

    pool: str
    keys: tuple[str, ...]


Effect = (
    StartOwner
    | StopOwner
    | StartWorker
    | Fill
    | OpenStore
    | ResizeKV
    | Prepare
    | Commit
    | Abandon
    | Park
    | HandOver
    | StopWorker
    | Free
)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an effect failed; ``lasting`` if trying again cannot help (too little memory, a wrong file)."""

    reason: str
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cluster as it is now: nodes alive, owners and workers that live, what is under way, what failed."""

    nodes: frozenset[str] = frozenset()
    pools: Mapping[str, PoolFact] = field(default_factory=dict)
    workers: Mapping[str, WorkerFact] = field(default_factory=dict)
    store: tuple[str, int] | None = None
    busy: frozenset[Effect] = frozenset()
    errors: Mapping[Effect, Fault] = field(default_factory=dict)
    now_s: float = 0.0
