"""What a deployment says of itself: immutable values that the status table, JSON and metrics are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..workers.protocol import EngineLoad


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """Pages of one pool by purpose; the counts add up to ``pages``."""

    name: str
    node: str
    page_bytes: int
    pages: int
    by_purpose: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's part in the generation and its counters since start.

    ``experts_per_layer`` counts physical experts; ``routed_tokens`` is how many (token, expert) pairs it served.
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


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """One consistent picture of a deployment."""

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
    detail: str = field(default="")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a serving worker takes requests."""

    worker: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Where starting up has got to: the phase in words, and bytes loaded of all."""

    phase: str
    loaded_bytes: int = 0
    total_bytes: int = 0
