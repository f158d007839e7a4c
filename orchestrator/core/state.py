"""What the controller remembers between two snapshots."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .layout import Layout


class Stage(Enum):
    """How far the next generation is. Until ``COMMIT`` it can be given up without anybody noticing."""

    FILL = "loading weights"
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


@dataclass(frozen=True, slots=True)
class Pending:
    """The generation that is coming, and how far it is."""

    record: Record
    stage: Stage


@dataclass(frozen=True, slots=True)
class State:
    """Target, the generation that serves, the one that is coming. ``failure`` says why nothing goes on."""

    target: Layout | None = None
    serving: Record | None = None
    pending: Pending | None = None
    next_generation: int = 1
    next_worker: int = 0
    failure: str = ""
