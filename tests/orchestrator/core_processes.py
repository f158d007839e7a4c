"""Owners' pools and workers as a simulation sees them: counts of pages instead of memory, flags instead of threads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from concertina.orchestrator.core.facts import WorkerFact
from concertina.workers.generation import kv_key
from concertina.workers.pages.table import ExtentRequest


class Trouble(Exception):
    """An effect failed, with its reason."""

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


class Violation(AssertionError):
    """An invariant does not hold; the message begins with its number in docs/invariants.md."""


def must(holds: bool, what: str) -> None:
    """Raise `Violation` unless ``holds``."""
    if not holds:
        raise Violation(what)


@dataclass(eq=False)
class Pool:
    """A pool's memory. It outlives its owner as long as a worker maps a page of it.

    ``budget`` are the pages that may be in use at any moment: a device's own memory, or all that the pool has. Asking
    for more is a fault of the controller's, unless the pool is ``tight``: what an earlier controller asked for may
    still come.
    """

    name: str
    node: str
    pages: int
    budget: int
    tight: bool = False
    hung_since_s: float | None = None  # its owner
    extents: dict[str, int] = field(default_factory=dict)
    loading: dict[str, int] = field(default_factory=dict)
    most: int = 0  # pages that were in use at any moment

    @property
    def used(self) -> int:
        return sum(self.extents.values()) + sum(self.loading.values())

    def load(self, requests: Iterable[ExtentRequest]) -> list[str]:
        """Allocate what is missing; it is there once `finish` has been called."""
        new = {r.key: r.pages for r in requests if r.key not in self.extents and r.key not in self.loading}
        self.take(sum(new.values()))
        self.loading.update(new)
        return list(new)

    def take(self, pages: int) -> None:
        """There must be so many free pages."""
        must(self.tight or self.used + pages <= self.budget, f"C12: {pages} more in {self}")
        if self.used + pages > self.budget:
            raise Trouble(f"too few pages in {self.name}", lasting=True)
        self.most = max(self.most, self.used + pages)

    def finish(self, keys: Iterable[str]) -> None:
        self.extents.update({key: self.loading.pop(key) for key in keys if key in self.loading})

    def check(self) -> None:
        must(self.used <= self.budget, f"C12: pool {self.name} uses {self.used} of {self.budget} pages: {self.extents}")


@dataclass(eq=False)
class KV:
    """KV that a worker maps: pages of its device's extent, and those it took over that still bear another's name."""

    pool: Pool
    device: str
    block_pages: int
    own: int
    foreign: dict[str, int] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return (self.own + sum(self.foreign.values())) // self.block_pages

    @property
    def keys(self) -> set[str]:
        return {kv_key(self.device), *self.foreign}


@dataclass(frozen=True, eq=False)
class Part:
    """What a worker maps of a generation."""

    generation: int
    keys: Mapping[Pool, frozenset[str]]


@dataclass(eq=False)
class Worker:
    """A worker process; see `WorkerFact` and `workers.worker.Worker` for what its fields mean."""

    name: str
    node: str
    prepared: dict[int, Part] = field(default_factory=dict)
    joining: dict[int, Part] = field(default_factory=dict)
    abandoned: set[int] = field(default_factory=set)
    part: Part | None = None
    parked: str = ""
    retired: int = 0
    failed: str = ""
    offered: int = 0
    kv: KV | None = None
    hung_since_s: float | None = None

    @property
    def serving(self) -> int:
        return self.part.generation if self.part is not None and not self.retired else 0

    @property
    def runs(self) -> bool:
        """Its engine makes steps, or would if its peers did."""
        return bool(self.serving) and not self.parked and not self.failed and self.hung_since_s is None

    def fact(self) -> WorkerFact:
        return WorkerFact(
            self.node,
            frozenset(self.prepared),
            self.serving,
            self.parked,
            self.retired,
            self.kv.device if self.kv else "",
            self.kv.blocks if self.kv else 0,
            self.failed,
            joining=frozenset(self.joining.keys() - self.abandoned),
            abandoned=max(self.abandoned, default=0),
        )

    def maps(self, pool: Pool, key: str) -> bool:
        parts = [*self.prepared.values(), *self.joining.values(), *([self.part] if self.part else [])]
        if any(key in part.keys.get(pool, ()) for part in parts):
            return True
        return self.kv is not None and self.kv.pool is pool and key in self.kv.keys

    def maps_any(self, pool: Pool) -> bool:
        parts = [*self.prepared.values(), *self.joining.values(), *([self.part] if self.part else [])]
        return any(pool in part.keys for part in parts) or (self.kv is not None and self.kv.pool is pool)

    def let_go_if_idle(self) -> None:
        if not (self.prepared or self.joining or self.part):
            self.kv = None

    def go(self, generation: int) -> None:
        """Switch to a generation, or retire if it was not prepared."""
        self.offered, self.parked = 0, ""
        if generation in self.prepared:
            self.part, self.retired = self.prepared.pop(generation), 0
        else:
            self.retired = generation
