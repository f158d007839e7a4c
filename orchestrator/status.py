"""What a deployment says of itself: immutable values that the status table, JSON and metrics are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..workers.protocol import EngineLoad


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """Pages of one pool by purpose; the counts add up to ``pages``.

    ``loaded_bytes`` were read from the checkpoint into it, ``copied_bytes`` from other pools.
    """

    name: str
    node: str
    page_bytes: int
    pages: int
    by_purpose: Mapping[str, int]
    loaded_bytes: int = 0
    copied_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's part in the generation and its counters since start.

    ``experts_per_layer`` counts physical experts; ``routed_tokens`` is how many (token, expert) pairs it served;
    ``kv_copied_bytes`` is KV that it has copied from other pools, as their devices left.
    """

    rank: int
    device: str
    node: str
    pid: int
    state: str
    experts_per_layer: tuple[int, ...]
    load: EngineLoad = field(default_factory=EngineLoad)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    routed_tokens: int = 0
    steps: int = 0
    kind: str = "cpu"
    kv_copied_bytes: int = 0


OperationState = Literal["running", "done", "failed", "canceled", "superseded"]


@dataclass(frozen=True, slots=True)
class OperationStatus:
    """What was asked of a deployment, and what became of it.

    ``kind`` is ``start``, ``scale``, ``rebalance`` or ``drain``; ``text`` says it in words (``2 -> 3 workers``),
    ``phase`` how far it is. Times are seconds since the deployment began: its goal served from ``committed_s`` on, and
    what it left behind was cleared away at ``ended_s``; 0 is not yet. ``bytes_done`` of ``bytes_total`` were copied or
    loaded for it.
    """

    id: str
    kind: str
    text: str
    state: OperationState
    phase: str = ""
    reason: str = ""
    started_s: float = 0.0
    committed_s: float = 0.0
    ended_s: float = 0.0
    bytes_total: int = 0
    bytes_done: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """One consistent picture of a deployment.

    ``operations`` are the latest ones, oldest first; ``cordoned`` are nodes that were drained and get no workers.
    ``emulated_step_ms`` above 0 says that step times are emulated, and how long every step takes at least.
    """

    name: str
    model: str
    endpoint: str
    generation: int
    phase: str
    exchange: str
    dtype: str
    layers: int
    experts: int
    uptime_s: float
    workers: tuple[WorkerStatus, ...] = ()
    pools: tuple[PoolStatus, ...] = ()
    standbys: int = 0
    operations: tuple[OperationStatus, ...] = ()
    cordoned: tuple[str, ...] = ()
    detail: str = field(default="")
    emulated_step_ms: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a worker takes requests, and the device that it runs on. One that is draining gets no new ones.

    ``speed`` is its device's, relative to the fastest one that serves.
    """

    worker: str
    host: str
    port: int
    device: str = ""
    draining: bool = False
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class MemberList:
    """Who takes requests now. Any change is a new version.

    ``awaited`` are devices whose worker is being replaced, and those that lost theirs as they left, until their KV has
    been handed over; ``heirs`` says which device has the KV of one that left.
    """

    version: int
    workers: tuple[WorkerAddress, ...] = ()
    awaited: frozenset[str] = frozenset()
    heirs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where starting up has got to: the phase in words, and bytes loaded of all."""

    phase: str
    loaded_bytes: int = 0
    total_bytes: int = 0


def bar_of(done: int, total: int) -> tuple[int, int | None]:
    """What a bar shows as done, and of how much: never all, since its clock would stop, and other work comes behind."""
    return min(done, max(0, total - 1)), total or None
