"""A cluster in a few dictionaries: carries out the core's effects one at a time, in any order."""

from __future__ import annotations

from dataclasses import dataclass, field

from concertina.orchestrator.core.facts import (
    Commit,
    Effect,
    Fill,
    Free,
    OpenStore,
    PoolFact,
    Prepare,
    Snapshot,
    StartOwner,
    StartWorker,
    StopWorker,
    WorkerFact,
)
from concertina.orchestrator.core.layout import Layout, Seat
from concertina.orchestrator.core.state import State
from concertina.orchestrator.core.step import Decision, step
from concertina.orchestrator.sizing import MemoryPlan
from concertina.planners.placement import balanced_placement


def make_layout(
    seats: list[tuple[str, str]], exchange: str = "shared", memory_mode: str = "shared", experts: int = 5
) -> Layout:
    """Two MoE layers; devices and nodes as given."""
    memory = MemoryPlan(page_bytes=65536, expert_pages=2, kv_block_pages=1, trunk_pages=3, device_pages=64)
    placed = tuple(Seat(*seat) for seat in seats)
    placement = balanced_placement([seat.device for seat in placed], 2, experts)
    return Layout(placed, placement, memory, memory_mode, exchange, 1 if exchange == "shared" else 0)


@dataclass
class World:
    """What is, and what is under way. `finish` makes one effect true; `fail` ends it with an error."""

    pools: dict[str, PoolFact] = field(default_factory=dict)
    workers: dict[str, WorkerFact] = field(default_factory=dict)
    store: tuple[str, int] | None = None
    busy: list[Effect] = field(default_factory=list)
    errors: dict[Effect, str] = field(default_factory=dict)
    offered: dict[str, int] = field(default_factory=dict)
    asked: list[Effect] = field(default_factory=list)

    def snapshot(self) -> Snapshot:
        errors, self.errors = self.errors, {}
        return Snapshot(
            pools=dict(self.pools),
            workers=dict(self.workers),
            store=self.store,
            busy=frozenset(self.busy),
            errors=errors,
        )

    def turn(self, state: State) -> Decision:
        decision = step(state, self.snapshot())
        assert not set(decision.effects) & set(self.busy), "asked for what is under way"
        self.busy.extend(decision.effects)
        self.asked.extend(decision.effects)
        return decision

    def finish(self, index: int) -> None:
        effect = self.busy.pop(index)
        match effect:
            case StartOwner(pool, node):
                self.pools[pool] = PoolFact(node, f"@{pool}", {})
            case StartWorker(worker, node):
                self.workers[worker] = WorkerFact(node)
            case OpenStore():
                self.store = ("127.0.0.1", 1)
            case Fill(pool, requests):
                fact = self.pools[pool]
                self.pools[pool] = PoolFact(fact.node, fact.address, {**fact.pages, **{r.key: (0,) for r in requests}})
            case Prepare(worker, generation):
                old = self.workers[worker]
                self.workers[worker] = WorkerFact(old.node, old.prepared | {generation}, old.serving)
            case Commit(worker, generation):
                self._commit(worker, generation)
            case StopWorker(worker):
                del self.workers[worker]
            case Free(pool, keys):
                fact = self.pools[pool]
                kept = {k: p for k, p in fact.pages.items() if k not in keys}
                self.pools[pool] = PoolFact(fact.node, fact.address, kept)

    def _commit(self, worker: str, generation: int) -> None:
        """Those that run switch together, once all of them have been told; the others at once."""
        if worker not in self.workers or self.workers[worker].serving == generation:
            return  # it came late, or twice
        self.offered[worker] = generation
        running = [w for w, fact in self.workers.items() if fact.serving not in (0, generation)]
        if worker not in running:
            self._go(worker, generation)
        elif all(self.offered.get(w) == generation for w in running):
            for w in running:
                self._go(w, generation)

    def _go(self, worker: str, generation: int) -> None:
        fact = self.workers[worker]
        if generation in fact.prepared:
            self.workers[worker] = WorkerFact(fact.node, fact.prepared - {generation}, generation)
        else:
            self.workers[worker] = WorkerFact(fact.node)

    def fail(self, index: int, why: str) -> None:
        self.errors[self.busy.pop(index)] = why

    def kill(self, worker: str) -> None:
        fact = self.workers[worker]
        self.workers[worker] = WorkerFact(fact.node, fact.prepared, fact.serving, "its process ended")
