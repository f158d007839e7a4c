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
    emulated_step_ms : float
        Least time of a forward pass, in milliseconds, as `EngineConfig` has it.
    """

    name: str
    host: str
    token: str = field(repr=False)
    threads: int
    scheduler: SchedulerConfig
    prefix_caching: bool = True
    emulated_step_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker says of itself.

    Parameters
    ----------
    name : str
    pid : int
    prepared : frozenset of int
        Generations that it could switch to.
    serving : int
        The generation that it runs, or ran until it parked; 0 for none.
    failed : str
        What ended its engine for good, or that it hangs; empty while neither is so.
    load, stats
        The engine's, also while it stands still.
    counts_LE : tuple of tuple of int
        (token, expert) pairs that it has routed in the generation ``counted``, by MoE layer and expert.
    parked : str
        Why its engine has stopped and waits for another generation; empty unless a peer was lost.
    retired : int
        The generation at whose coming it left; its sequences wait for `release`. 0 for none.
    device : str
        The device whose KV it maps; empty for none.
    kv_blocks : int
        KV blocks that it maps.
    kv_copied_bytes : int
        Of KV that it has copied from other pools since it has had that device.
    serial : int
        Higher in a later report of the same process.
    address : (str, int) or None
        Where the ingress connects; None without an engine.
    joining : frozenset of int
        Generations that it is preparing, but for those that were abandoned.
    abandoned : int
        The latest generation that was abandoned; 0 for none.
    """

    name: str
    pid: int
    prepared: frozenset[int]
    serving: int
    failed: str
    load: EngineLoad = field(default_factory=EngineLoad)
    stats: EngineStats = field(default_factory=EngineStats)
    counts_LE: tuple[tuple[int, ...], ...] = ()
    counted: int = 0
    parked: str = ""
    retired: int = 0
    device: str = ""
    kv_blocks: int = 0
    kv_copied_bytes: int = 0
    serial: int = 0
    address: tuple[str, int] | None = None
    joining: frozenset[int] = frozenset()
    abandoned: int = 0

    @property
    def situation(self) -> tuple[frozenset[int], int, str, int, str]:
        """What the controller acts on; `watch` returns when it changes."""
        return self.prepared, self.serving, self.parked, self.retired, self.failed
