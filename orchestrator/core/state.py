"""What the controller remembers between two snapshots. All of it is durable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

from .layout import Layout

OperationKind = Literal["start", "scale", "rebalance", "drain"]
Outcome = Literal["running", "done", "failed", "canceled", "superseded"]


class Stage(Enum):
    """How far the next generation is. Until ``COMMIT`` it can be given up without anybody noticing."""

    YIELD = "making room"
    FILL = "moving weights"
    PREPARE = "forming the generation"
    COMMIT = "switching"


@dataclass(frozen=True, slots=True)
class Record:
    """A generation: its number, its layout and the worker of every rank."""

    id: int
    layout: Layout
    workers: tuple[str, ...]

    def rank_of(self, worker: str) -> int:
        return self.workers.index(worker)

    def worker_of(self, device: str) -> str | None:
        """The worker of a device, if the device has a part in this generation."""
        devices = self.layout.devices
        return self.workers[devices.index(device)] if device in devices else None


@dataclass(frozen=True, slots=True)
class Pending:
    """The generation that is coming, and how far it is.

    Parameters
    ----------
    recovery : bool
        The one before it is broken: its members are parked or gone, and nobody waits for a common boundary.
    doomed : str
        Why it is being withdrawn; empty if it is not.
    lasting : bool
        Whether trying again would be in vain.
    """

    record: Record
    stage: Stage
    recovery: bool = False
    doomed: str = ""
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Leaving:
    """What a drain asks for beside a layout: until when devices hand over, and the node that takes no new ones.

    ``begun``: some of them are leaving already, so that being where they are not is not the end of it.
    """

    deadlines: Mapping[str, float] = field(default_factory=dict)
    node: str = ""
    begun: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """What was asked for, and what became of it. Times are the shell's, in seconds; 0 is not yet.

    ``route`` are layouts to go through, one generation each; the last one is the goal. One that has ended has none: the
    state is written down whole, and layouts are most of it. ``cordons`` is the node that it keeps new devices from, if
    it is the first to do so. ``subject`` is what of its kind it is about (a number of workers, a device, a node):
    asking for that again is this operation, whatever would be planned by now. Empty: only the goal says so.
    """

    id: str
    kind: OperationKind
    text: str
    route: tuple[Layout, ...]
    started_s: float
    outcome: Outcome = "running"
    reason: str = ""
    committed_s: float = 0.0
    ended_s: float = 0.0
    cordons: str = ""
    subject: str = ""

    @property
    def goal(self) -> Layout:
        return self.route[-1]


@dataclass(frozen=True, slots=True)
class State:
    """Operations (the last one may be under way), the generation that serves and the one that is coming.

    Parameters
    ----------
    left : Record or None
        The generation that served before, where no worker of it serves now, and some of it may not know that yet.
    operations : tuple of Operation
        Oldest first; a bounded number of them.
    standbys : int
        Idle workers to keep on every node that serves.
    began_s : float
        When the deployment began.
    attempts : int
        Generations withdrawn in a row.
    short_lives : int
        Generations in a row that broke as soon as they served.
    served_since_s : float
    broken : bool
        The generation that serves was found broken, and none that recovers serves yet.
    failed_s : float
        When a generation was last withdrawn, or found broken.
    standby_starts : int
        Starts of standbys in a row, with no generation switched to between; ``standby_started_s`` is when the last was.
    deadlines : mapping of str to float
        Until when the KV of devices that leave may be handed over; after that it is given up.
    cordoned : frozenset of str
        Nodes that were drained: no device is placed there any more.
    failure : str
        Why nothing goes on any more; empty otherwise.
    """

    operations: tuple[Operation, ...] = ()
    left: Record | None = None
    serving: Record | None = None
    pending: Pending | None = None
    standbys: int = 0
    began_s: float = 0.0
    next_generation: int = 1
    next_worker: int = 0
    next_operation: int = 1
    attempts: int = 0
    short_lives: int = 0
    served_since_s: float = 0.0
    broken: bool = False
    failed_s: float = 0.0
    standby_starts: int = 0
    standby_started_s: float = 0.0
    deadlines: Mapping[str, float] = field(default_factory=dict)
    cordoned: frozenset[str] = frozenset()
    failure: str = ""

    @property
    def durable(self) -> State:
        """What must outlive the controller before effects start.

        How far the coming generation is follows from what is there, until it may be switched to; but not whether its
        members have met at a store, which ends with the controller.
        """
        pending = self.pending
        if pending is None or pending.stage is Stage.COMMIT or pending.record.layout.exchange not in ("solo", "shared"):
            return self
        return replace(self, pending=replace(pending, stage=Stage.YIELD))

    @property
    def operation(self) -> Operation | None:
        """The one under way."""
        last = self.operations[-1] if self.operations else None
        return last if last is not None and last.outcome == "running" else None
