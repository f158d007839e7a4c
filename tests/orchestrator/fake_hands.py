"""`Hands` in memory: owners and workers that say yes to everything, and fail or die when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from concertina.errors import InternalError, OperatorError
from concertina.orchestrator.hands import NodeInfo
from concertina.workers.generation import Assignment
from concertina.workers.loading import Piece
from concertina.workers.owner import OwnerConfig
from concertina.workers.pages.table import ExtentRequest
from concertina.workers.roles import WorkerConfig, WorkerReport


@dataclass
class Faults:
    """What fails: the names of calls, each with its error."""

    errors: dict[str, Exception] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    async def met(self, call: str) -> None:
        self.calls.append(call)
        await asyncio.sleep(0)
        if call in self.errors:
            raise self.errors[call]


@dataclass
class FakeOwner:
    """A pool that hands out page numbers one behind the other."""

    config: OwnerConfig
    faults: Faults
    extents: dict[str, tuple[int, ...]] = field(default_factory=dict)
    loaded: int = 0
    next_page: int = 1

    async def address(self) -> str:
        return f"@{self.config.name}"

    async def fill(self, requests: Sequence[ExtentRequest], pieces: Sequence[Piece]) -> None:
        await self.faults.met("fill")
        for r in requests:
            if r.key not in self.extents:
                self.extents[r.key] = tuple(range(self.next_page, self.next_page + r.pages))
                self.next_page += r.pages
        if self.next_page > self.config.pages:
            raise OperatorError("out of pages")
        self.loaded += sum(p.source.nbytes for p in pieces)

    async def loaded_bytes(self) -> int:
        return self.loaded

    async def free(self, keys: Sequence[str]) -> None:
        for key in keys:
            del self.extents[key]

    async def pages(self) -> Mapping[str, tuple[int, ...]]:
        return dict(self.extents)

    async def usage(self) -> Mapping[str, int]:
        used = sum(map(len, self.extents.values()))
        return {"kv": used, "free": self.config.pages - used}


@dataclass
class FakeWorker:
    """Prepares and serves what it is told."""

    config: WorkerConfig
    faults: Faults
    number: int
    prepared: dict[int, Assignment] = field(default_factory=dict)
    serving: int = 0
    dead: bool = False
    stopped: bool = False

    def _alive(self) -> None:
        if self.dead:
            raise InternalError(f"{self.config.name}: its process ended")

    async def prepare(self, assignment: Assignment) -> None:
        self._alive()
        await self.faults.met("prepare")
        self.prepared[assignment.generation.id] = assignment

    async def abandon(self, generation: int) -> None:
        del self.prepared[generation]

    async def commit(self, generation: int) -> None:
        self._alive()
        await self.faults.met("commit")
        assert generation in self.prepared
        self.serving = generation

    async def address(self) -> tuple[str, int]:
        return self.config.host, 9000 + self.number

    async def report(self) -> WorkerReport:
        self._alive()
        failed = f"{type(e).__name__}: {e}" if (e := self.faults.errors.get("engine")) else ""
        return WorkerReport(self.config.name, 100 + self.number, frozenset(self.prepared), self.serving, failed)

    async def stop(self) -> None:
        self._alive()
        self.stopped = True


class FakeHands:
    """Everything with an effect, without one."""

    def __init__(self, *nodes: NodeInfo) -> None:
        self.faults = Faults()
        self.owners: list[FakeOwner] = []
        self.workers: list[FakeWorker] = []
        self._nodes = list(nodes)
        self._now_s = 0.0

    async def nodes(self) -> list[NodeInfo]:
        return self._nodes

    async def start_owner(self, node: str, config: OwnerConfig) -> FakeOwner:
        await self.faults.met("start_owner")
        self.owners.append(FakeOwner(config, self.faults))
        return self.owners[-1]

    async def start_worker(self, node: str, config: WorkerConfig) -> FakeWorker:
        await self.faults.met("start_worker")
        self.workers.append(FakeWorker(config, self.faults, len(self.workers)))
        return self.workers[-1]

    async def open_store(self) -> tuple[str, int]:
        await self.faults.met("open_store")
        return "10.0.0.1", 5555

    def now_s(self) -> float:
        self._now_s += 0.001
        return self._now_s
