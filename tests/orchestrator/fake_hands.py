"""`Hands` in memory: owners and workers that say yes to everything, and fail or die when a test says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from concertina.errors import InternalError, OperatorError, Unreachable
from concertina.orchestrator.hands import Existing, NodeInfo
from concertina.workers.generation import Assignment, KVSource, kv_key
from concertina.workers.loading import Piece
from concertina.workers.owner_roles import OwnerConfig, OwnerReport
from concertina.workers.pages.table import ExtentRequest
from concertina.workers.pages.transfer import CopyPlan, PageSource
from concertina.workers.protocol import EngineLoad
from concertina.workers.roles import WorkerConfig, WorkerReport


@dataclass
class Faults:
    """What fails: the names of calls, each with its error; those that are held wait."""

    errors: dict[str, Exception] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    held: set[str] = field(default_factory=set)

    async def met(self, call: str) -> None:
        self.calls.append(call)
        await asyncio.sleep(0)
        while call in self.held:
            await asyncio.sleep(0.01)
        if call in self.errors:
            raise self.errors[call]


@dataclass
class FakeOwner:
    """A pool that hands out page numbers one behind the other."""

    config_: OwnerConfig
    faults: Faults
    dead: bool = False
    hangs: bool = False
    unreachable: bool = False
    extents: dict[str, tuple[int, ...]] = field(default_factory=dict)
    loaded: int = 0
    copied: int = 0
    version: int = 0
    next_page: int = 1

    async def fill(
        self, requests: Sequence[ExtentRequest], pieces: Sequence[Piece], copies: Sequence[CopyPlan], seen: int = -1
    ) -> OwnerReport:
        await self.faults.met("fill")
        for r in requests:
            if r.key not in self.extents:
                self._take(r.key, r.pages)
        copied = {plan.key for plan in copies}
        self.copied += sum(len(plan.pages) for plan in copies) * self.config_.page_bytes
        self.loaded += sum(p.source.nbytes for p in pieces if p.key not in copied)
        return await self.report(seen)

    def _take(self, key: str, pages: int) -> None:
        self._alive()
        if self.next_page + pages > self.config_.pages:
            raise OperatorError("out of pages")
        taken = tuple(range(self.next_page, self.next_page + pages))
        self.extents[key] = (*self.extents.get(key, ()), *taken)
        self.next_page += pages

    def _alive(self) -> None:
        if self.dead:
            raise InternalError(f"memory owner {self.config_.name}: its process ended")
        if self.unreachable:
            raise Unreachable(f"memory owner {self.config_.name}: cannot be reached")

    async def extend(self, key: str, purpose: str, pages: int, had: int) -> tuple[int, ...]:
        self._take(key, pages)
        return self.extents[key]

    async def trim(self, key: str, keep: Sequence[int]) -> tuple[int, ...]:
        self._alive()
        kept = set(keep)
        self.extents[key] = tuple(page for page in self.extents[key] if page in kept)
        return self.extents[key]

    async def relabel(self, key: str, pages: Sequence[int], to_key: str) -> None:
        self.extents[to_key] = (*self.extents.get(to_key, ()), *pages)
        gone = set(pages)
        self.extents[key] = tuple(page for page in self.extents[key] if page not in gone)
        if not self.extents[key]:
            del self.extents[key]

    async def config(self) -> OwnerConfig:
        self._alive()
        return self.config_

    async def source(self) -> PageSource:
        return PageSource(f"@{self.config_.name}", "127.0.0.1", 0, self.config_.token)

    async def wait(self, timeout_s: float) -> None:
        for _ in range(int(timeout_s / 0.01)):
            self._alive()
            await asyncio.sleep(0.01)

    async def free(self, keys: Sequence[str], seen: int = -1) -> OwnerReport:
        for key in keys:
            self.extents.pop(key, None)
        return await self.report(seen)

    async def report(self, seen: int = -1) -> OwnerReport:
        while self.hangs and not self.dead:
            await asyncio.sleep(0.01)
        self._alive()
        self.version += 1
        return OwnerReport(self.version, dict(self.extents), self.loaded, self.copied)

    async def usage(self) -> Mapping[str, int]:
        used = sum(map(len, self.extents.values()))
        return {"kv": used, "free": self.config_.pages - used}


@dataclass
class FakeWorker:
    """Prepares and serves what it is told."""

    config: WorkerConfig
    faults: Faults
    number: int
    prepared: dict[int, Assignment] = field(default_factory=dict)
    ready: set[int] = field(default_factory=set)
    serving: int = 0
    retired: int = 0
    parked: str = ""
    device: str = ""
    kv: tuple[int, ...] = ()
    left_to: str = ""
    load: EngineLoad = field(default_factory=EngineLoad)
    serials: Iterator[int] = field(default_factory=lambda: count(1))
    released_to: str | None = None
    dead: bool = False
    hangs: bool = False
    unreachable: bool = False
    stopped: bool = False
    limits_s: list[float | None] = field(default_factory=list)
    limited: asyncio.Event = field(default_factory=asyncio.Event)
    abandoned: int = 0
    told: list[int] = field(default_factory=list)  # generations in which it was to park

    async def _alive(self) -> None:
        while self.hangs and not self.dead:
            await asyncio.sleep(0.01)
        if self.dead:
            raise InternalError(f"{self.config.name}: its process ended")
        if self.unreachable:
            raise Unreachable(f"{self.config.name}: cannot be reached")

    async def prepare(self, assignment: Assignment) -> WorkerReport:
        await self._alive()
        await self.faults.met("prepare")
        self.prepared[assignment.generation.id] = assignment
        self.ready.add(assignment.generation.id)
        return await self.report()

    async def abandon(self, generation: int) -> WorkerReport:
        await self._alive()
        self.ready.discard(generation)
        self.abandoned = max(self.abandoned, generation)
        return await self.report()

    async def commit(self, generation: int, heir: str = "") -> WorkerReport:
        await self._alive()
        await self.faults.met("commit")
        self.parked = ""
        if generation in (self.serving, self.retired):
            return await self.report()
        if generation not in self.ready:
            self.serving, self.retired, self.left_to = 0, generation, heir
            return await self.report()
        self.ready.discard(generation)
        self.serving = generation
        if not self.device:
            assignment = self.prepared[generation]
            self.device = assignment.generation.placement.devices[assignment.rank]
            self.kv = assignment.device.pages[kv_key(self.device)]
        return await self.report()

    async def park(self, generation: int) -> WorkerReport:
        await self._alive()
        if self.serving == generation:
            self.parked = "told"
            self.told.append(generation)
        return await self.report()

    async def kv_pages(self) -> tuple[int, ...]:
        await self._alive()
        return self.kv

    async def resize_kv(self, blocks: int, fresh: Sequence[int]) -> tuple[int, ...]:
        await self._alive()
        self.kv = (*self.kv, *fresh)[: blocks * self._block_pages]
        return self.kv

    async def adopt_kv(self, source: KVSource, blocks: int, limit_s: float | None) -> tuple[int, ...]:
        await self._alive()
        self.limits_s.append(limit_s)
        self.limited.clear()
        adopting = [asyncio.create_task(self.faults.met("adopt_kv")), asyncio.create_task(self.limited.wait())]
        try:
            done, _ = await asyncio.wait(adopting, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for call in adopting:
                call.cancel()
        for call in done:
            call.result()
        return self.kv

    async def limit_kv(self, source: KVSource, limit_s: float | None) -> None:
        """What is adopted comes to its end at once."""
        await self._alive()
        self.limits_s.append(limit_s)
        self.limited.set()

    async def release(self, moved_to: str) -> None:
        await self._alive()
        await self.faults.met("release")
        self.released_to, self.retired, self.device, self.kv = moved_to, 0, "", ()

    async def lend(self, pool: str) -> str | None:
        await self._alive()
        await self.faults.met("lend")
        part = self.prepared.get(self.serving)
        mapped = part is not None and pool in (part.device.name, part.node.name)
        return f"@lent/{pool}" if mapped else None

    @property
    def _block_pages(self) -> int:
        assert self.device
        latest = self.prepared[max(self.prepared)].generation
        needed = latest.model.layers * latest.block_tokens * latest.model.attention.kv_width * 4
        return -(-needed // latest.page_bytes)

    async def report(self) -> WorkerReport:
        await self._alive()
        failed = f"{type(e).__name__}: {e}" if (e := self.faults.errors.get("engine")) else ""
        blocks = len(self.kv) // self._block_pages if self.device else 0
        return WorkerReport(
            self.config.name,
            100 + self.number,
            frozenset(self.ready),
            self.serving,
            failed,
            parked=self.parked,
            retired=self.retired,
            device=self.device,
            kv_blocks=blocks,
            load=self.load,
            serial=next(self.serials),
            address=(self.config.host, 9000 + self.number) if self.serving or self.retired else None,
            abandoned=self.abandoned,
        )

    async def watch(self, seen: WorkerReport, timeout_s: float) -> WorkerReport:
        for _ in range(int(timeout_s / 0.01)):
            if (now := await self.report()).situation != seen.situation:
                return now
            await asyncio.sleep(0.01)
        return await self.report()

    async def stop(self) -> None:
        await self._alive()
        self.stopped = True


class FakeHands:
    """Everything with an effect, without one."""

    def __init__(self, *nodes: NodeInfo) -> None:
        self.faults = Faults()
        self.owners: list[FakeOwner] = []
        self.workers: list[FakeWorker] = []
        self.state: bytes | None = None
        self.model: bytes | None = None
        self.alive = list(nodes)
        self.placed = True  # whether what is started has a process
        self.looks = 0  # at that
        self.killed: list[str] = []

    async def nodes(self, *, anew: bool = False) -> list[NodeInfo]:
        return self.alive

    async def start_owner(self, node: str, config: OwnerConfig, adopt_from: str | None = None) -> FakeOwner:
        await self.faults.met("start_owner")
        owner = FakeOwner(config, self.faults)
        if adopt_from is not None:
            before = next(o for o in reversed(self.owners) if o.config_.name == config.name)
            owner.extents, owner.next_page = before.extents, before.next_page
        self.owners.append(owner)
        return owner

    async def start_worker(self, node: str, config: WorkerConfig) -> FakeWorker:
        await self.faults.met("start_worker")
        self.workers.append(FakeWorker(config, self.faults, len(self.workers)))
        return self.workers[-1]

    async def existing(self) -> Existing:
        owners = {o.config_.name: o for o in self.owners if not o.dead}
        return Existing(owners, {w.config.name: ("here", w) for w in self.workers if not w.dead})

    async def begun(self, name: str) -> bool:
        self.looks += 1
        return self.placed

    async def kill(self, name: str) -> None:
        await self.faults.met("kill")
        self.killed.append(name)
        for process in (*self.owners, *self.workers):
            if name in (getattr(process, "config_", None) or process.config).name:
                process.dead = True

    async def open_store(self) -> tuple[str, int]:
        await self.faults.met("open_store")
        return "10.0.0.1", 5555

    async def save(self, state: bytes) -> None:
        self.state = state

    async def load(self) -> bytes | None:
        return self.state

    async def keep(self, model: bytes) -> None:
        self.model = model

    async def kept(self) -> bytes | None:
        return self.model

    async def forget(self) -> None:
        self.state = None

    def now_s(self) -> float:
        return time.monotonic()
