"""What a worker is told and what it says of itself. No torch, so that a controller can read it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .engine.scheduler import SchedulerConfig
from .engine.stats import EngineStats
from .protocol import EngineLoad


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker needs to know before it has a role.

    Parameters
    ----------
    name : str
    host : str
        Address at which the ingress reaches it.
    token : str
        The deployment's secret.
    threads : int
        Compute threads.
    scheduler : SchedulerConfig
    prefix_caching : bool
    """

    name: str
    host: str
    token: str = field(repr=False)
    threads: int
    scheduler: SchedulerConfig
    prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker says of itself: generations it could switch to, the one it runs (0: none), and its counters.

    ``counts_LE`` are the (token, expert) pairs that it has routed in this generation, by MoE layer and expert.
    """

    name: str
    pid: int
    prepared: frozenset[int]
    serving: int
    failed: str
    load: EngineLoad = field(default_factory=EngineLoad)
    stats: EngineStats = field(default_factory=EngineStats)
    counts_LE: tuple[tuple[int, ...], ...] = ()
