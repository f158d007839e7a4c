"""What the shell sees (`Snapshot`) and what it may do (`Effect`): plain values without behaviour.

Every effect is idempotent: doing it twice, or again after a restart, ends in the same place. An effect under way is in
`Snapshot.busy`; one that failed is in `Snapshot.errors` until the state has taken note of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...workers.pages.table import ExtentRequest


@dataclass(frozen=True, slots=True)
class PoolFact:
    """A memory owner that answers: where its pool is handed out, and the finished extents in it."""

    node: str
    address: str
    pages: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class WorkerFact:
    """A worker that answers, or has just failed.

    ``prepared`` are generations it could switch to; ``serving`` is the one it runs (0: none); ``failed`` says why it
    cannot go on (empty: it can).
    """

    node: str
    prepared: frozenset[int] = frozenset()
    serving: int = 0
    failed: str = ""


@dataclass(frozen=True, slots=True)
class StartOwner:
    """Start a memory owner with an empty pool. Nothing must be durable before."""

    pool: str
    node: str
    pages: int


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker without a role. Nothing must be durable before."""

    worker: str
    node: str


@dataclass(frozen=True, slots=True)
class Fill:
    """Allocate what is missing of these extents and load weights into it. The owner must be there."""

    pool: str
    requests: tuple[ExtentRequest, ...]


@dataclass(frozen=True, slots=True)
class OpenStore:
    """Open the store at which the members of process groups meet."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Map the pages of a generation and join its exchange, beside whatever runs. All its extents must be there."""

    worker: str
    generation: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Switch to a generation at the next common step boundary. Every member must have prepared it."""

    worker: str
    generation: int


@dataclass(frozen=True, slots=True)
class StopWorker:
    """End a worker that no generation needs."""

    worker: str


@dataclass(frozen=True, slots=True)
class Free:
    """Give back extents that no generation needs. Nobody may map them any more."""

    pool: str
    keys: tuple[str, ...]


Effect = StartOwner | StartWorker | Fill | OpenStore | Prepare | Commit | StopWorker | Free


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cluster as it is now: nodes alive, owners and workers that answer, and what is under way."""

    nodes: frozenset[str] = frozenset()
    pools: Mapping[str, PoolFact] = field(default_factory=dict)
    workers: Mapping[str, WorkerFact] = field(default_factory=dict)
    store: tuple[str, int] | None = None
    busy: frozenset[Effect] = frozenset()
    errors: Mapping[Effect, str] = field(default_factory=dict)
