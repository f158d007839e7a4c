"""A cluster to be simulated: processes, what is under way, what the controller sees, and what can go wrong.

What a controller that died had asked for may still happen at any later time.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from concertina.orchestrator.core.facts import (
    Effect,
    Fault,
    PoolFact,
    Snapshot,
    StartOwner,
    StartWorker,
    WorkerFact,
)
from concertina.orchestrator.core.state import Record

from .core_calls import BETWEEN, Deed
from .core_deeds import deed
from .core_kv import take_over
from .core_processes import Pool, Trouble, Worker, must

HANG_S = 8.0
_NOTICE_S = 2.0


@cache
def _pages(count: int) -> tuple[int, ...]:
    """Only their number matters."""
    return (0,) * count


@dataclass
class World:
    """One cluster. ``order`` decides whatever the controller does not.

    Parameters
    ----------
    order : random.Random
    device_pages : int or None
        A device's own memory, where devices have one.
    """

    order: random.Random
    device_pages: int | None = None
    now_s: float = 0.0
    nodes_alive: set[str] = field(default_factory=lambda: {"a", "b"})
    nodes_known: set[str] = field(default_factory=lambda: {"a", "b"})
    owners: dict[str, Pool] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    store: tuple[str, int] | None = None
    busy: dict[Effect, Deed] = field(default_factory=dict)
    errors: dict[Effect, Fault] = field(default_factory=dict)
    orphans: list[Deed] = field(default_factory=list)
    records: dict[int, Record] = field(default_factory=dict)
    heirs: dict[int, Mapping[str, str]] = field(default_factory=dict)
    ever_prepared: dict[int, set[str]] = field(default_factory=dict)
    wanted: tuple[Record | None, Record | None] = (None, None)  # that serves, that is coming
    formed: bool = False  # the coming generation is past filling
    stuck: set[str] = field(default_factory=set)  # workers and pools whose process hangs while it starts
    lost_pools: set[str] = field(default_factory=set)
    undisturbed: bool = False  # the latest generation runs, and nothing has been done to it since it began to
    latest: int = 0  # that made steps
    _seen: dict[str, WorkerFact] = field(default_factory=dict)
    _ghosts: dict[str, tuple[WorkerFact, float]] = field(default_factory=dict)

    def snapshot(self, stale: float = 0.0) -> Snapshot:
        """What the controller sees; a worker's word is an old one with probability ``stale``."""
        self._ghosts = {n: g for n, g in self._ghosts.items() if g[1] > self.now_s and n not in self.workers}
        facts = {name: fact for name, (fact, _) in self._ghosts.items()}
        for name, worker in self.workers.items():
            late_s = 0.0 if worker.hung_since_s is None else self.now_s - worker.hung_since_s
            if late_s > HANG_S:
                facts[name] = replace(self._seen.get(name, worker.fact()), failed="gave no answer", stale=True)
            elif name in self._seen and (late_s or self.order.random() < stale):
                facts[name] = replace(self._seen[name], stale=True)
            else:
                facts[name] = self._seen[name] = worker.fact()
        errors, self.errors = self.errors, {}
        pools = {name: self._pool_fact(pool) for name, pool in self.owners.items()}
        return Snapshot(frozenset(self.nodes_known), pools, facts, self.store, frozenset(self.busy), errors, self.now_s)

    def _pool_fact(self, pool: Pool) -> PoolFact:
        late_s = 0.0 if pool.hung_since_s is None else self.now_s - pool.hung_since_s
        pages = {key: _pages(count) for key, count in pool.extents.items()}
        failed = "gave no answer" if late_s > HANG_S else ""
        return PoolFact(pool.node, f"@{pool.name}", pages, failed, stale=pool.hung_since_s is not None)

    def snapshot_lags(self) -> bool:
        """Whether somebody's death is not known yet."""
        return any(until_s > self.now_s for _, until_s in self._ghosts.values())

    def start(self, effect: Effect) -> None:
        must(effect not in self.busy, f"C4: {effect} was asked for while under way")
        self.busy[effect] = deed(self, effect)

    def advance(self, effect: Effect) -> None:
        """Let an effect take its next piece of work."""
        try:
            next(self.busy[effect])
        except StopIteration:
            del self.busy[effect]
        except Trouble as trouble:
            self._failed(effect, str(trouble), trouble.lasting)

    def fail(self, effect: Effect, *, after: bool) -> None:
        """End an effect with an error, before its next piece of work or after all of it that can be done now."""
        for _ in range(8 if after else 0):
            if effect in self.busy and effect not in self.errors:
                self.advance(effect)
        if effect not in self.errors:
            self._failed(effect, "a fault was injected")

    def _failed(self, effect: Effect, why: str, lasting: bool = False) -> None:
        self.errors[effect] = Fault(why, lasting)
        self.busy[effect] = iter((BETWEEN,))  # for a while, before it may be tried again

    def restart(self) -> None:
        """The controller dies; calls to other processes end without it, at some time."""
        self.orphans += [_one_call(under_way) for under_way in self.busy.values() if self.order.random() < 0.5]
        for pool in self.owners.values():
            pool.tight = pool.tight or bool(self.orphans)
        self.busy, self.errors, self.store = {}, {}, None
        self._seen, self._ghosts = {}, {}

    def double(self, effect: Effect) -> None:
        """Have an effect's first call made twice."""
        again = deed(self, effect)
        next(again, None)  # some look before they call
        self.orphans.append(_one_call(again))

    def advance_orphan(self, orphan: Deed) -> None:
        try:
            next(orphan)
        except (StopIteration, Trouble):
            self.orphans.remove(orphan)

    # Processes

    def end_worker(self, name: str, *, noticed: bool = False) -> None:
        worker = self.workers.pop(name, None)
        if worker is None:
            return
        self._disturb(worker)
        if not noticed and name in self._seen:
            until_s = self.now_s + self.order.uniform(0, _NOTICE_S)
            self._ghosts[name] = (replace(self._seen[name], stale=True), until_s)
        self._seen.pop(name, None)

    def hang(self, name: str) -> None:
        self.workers[name].hung_since_s = self.now_s
        self._disturb(self.workers[name])

    def break_engine(self, name: str) -> None:
        self.workers[name].failed = "its engine failed"
        self._disturb(self.workers[name])

    def hang_start(self, effect: Effect) -> None:
        if isinstance(effect, StartWorker | StartOwner):
            self.stuck.add(effect.worker if isinstance(effect, StartWorker) else effect.pool)

    def hang_owner(self, name: str) -> None:
        self.owners[name].hung_since_s = self.now_s

    def end_owner(self, name: str) -> None:
        pool = self.owners.pop(name)
        pool.loading.clear()
        pool.hung_since_s = None

    def end_node(self, name: str) -> None:
        self.nodes_alive.discard(name)
        for worker in [w for w in self.workers.values() if w.node == name]:
            self.end_worker(worker.name)
        for pool in [p for p in self.owners.values() if p.node == name]:
            self.end_owner(pool.name)

    def _disturb(self, worker: Worker) -> None:
        if worker.part is not None and not worker.retired:
            self.undisturbed = False

    def budget(self, pool: str, pages: int) -> int:
        own = self.device_pages if pool.startswith("device/") else None
        return pages if own is None else own

    def mappings(self, name: str) -> Iterator[tuple[Worker, Pool]]:
        """Workers that map something of a pool of that name, and which."""
        for worker in self.workers.values():
            parts = [*worker.prepared.values(), *worker.joining.values(), *([worker.part] if worker.part else [])]
            pools = {pool for part in parts for pool in part.keys} | ({worker.kv.pool} if worker.kv else set())
            yield from ((worker, pool) for pool in pools if pool.name == name)

    def free(self, name: str, keys: Iterable[str]) -> None:
        """Nothing happens to an extent that somebody maps."""
        pool = self.owners.get(name)
        if pool is None:
            raise Trouble(f"memory owner {name}: its process ended")
        if any(w.maps(pool, key) for w in self.workers.values() for key in keys):
            return
        needed = self.needed(name) & set(keys)
        must(not needed, f"C11: {needed} of {name} freed, which a generation needs")
        for key in keys:
            pool.extents.pop(key, None)

    def needed(self, pool: str) -> set[str]:
        """Extents that may not go: all of the generations' but KV that nobody maps, until the next one is formed."""
        needed = set()
        for record in self.wanted:
            keys = {r.key for r in record.layout.extents(record.id).get(pool, ())} if record else set()
            needed |= keys if record is self.wanted[1] and self.formed else {k for k in keys if not k.startswith("kv/")}
        return needed

    # Generations

    def with_it(self, name: str, generation: int) -> bool:
        worker = self.workers.get(name)
        return worker is not None and (
            generation in worker.joining or generation in worker.prepared or worker.serving == generation
        )

    def lost_to(self, name: str, generation: int) -> bool:
        """Whether peers in this generation wait for a member in vain."""
        worker = self.workers.get(name)
        if worker is None or worker.hung_since_s is not None or worker.failed or generation in worker.abandoned:
            return True
        if not self.with_it(name, generation):
            return True  # it was started anew: members switch together
        return worker.serving == generation and bool(worker.parked)

    def _sees_a_loss(self, generation: int) -> bool:
        """Over a network only that a process has ended, and not even that if its machine sends nothing any more."""
        record = self.records[generation]
        lost = {
            name: seat
            for name, seat in zip(record.workers, record.layout.seats, strict=True)
            if self.lost_to(name, generation)
        }
        if record.layout.exchange == "shared":
            return bool(lost)
        return any(name not in self.workers and seat.node in self.nodes_alive for name, seat in lost.items())

    def running(self) -> set[int]:
        """Generations that a worker runs."""
        return {worker.serving for worker in self.workers.values() if worker.runs}

    def steps(self, generation: int) -> bool:
        """Whether all members run it, so that it makes steps."""
        found = [self.workers.get(name) for name in self.records[generation].workers]
        return all(w is not None and w.runs and w.serving == generation for w in found)

    def switch(self, worker: Worker, generation: int) -> None:
        known = [record.id for record in self.wanted if record is not None]
        must(generation in known, f"C2: {worker.name} came to generation {generation} after it was withdrawn")
        lacking = set(self.records[generation].workers) - self.ever_prepared.get(generation, set())
        must(not lacking, f"C2: {worker.name} came to generation {generation}, which {lacking} had not prepared")
        awake = [w for w in self.workers.values() if w is not worker and w.serving and not (w.parked or w.failed)]
        device = worker.kv.device if worker.kv is not None else ""
        twice = [w.name for w in awake if w.kv is not None and w.kv.device == device and w.serving < generation]
        must(not twice, f"C12: {worker.name} writes the KV of {device}, and so may {twice}")
        worker.go(generation)

    def boundary(self, generation: int, *, dies: bool = False) -> None:
        """All members have met; they switch if all offer it. One may die then, and others may not have heard it all."""
        if not self.steps(generation):
            return
        members = [self.workers[name] for name in self.records[generation].workers]
        offers = {worker.offered for worker in members}
        if len(offers) != 1 or offers == {0}:
            return
        (offer,) = offers
        dead = self.order.choice(members) if dies else None
        if dead is not None:
            self.end_worker(dead.name)
        for worker in members:
            if worker is dead:
                continue
            if dead is not None and self.order.random() < 0.5:
                worker.parked = "a peer was lost"
            elif offer in worker.prepared:
                self.switch(worker, offer)
                for device in (d for d, heir in self.heirs.get(offer, {}).items() if heir == worker.name):
                    take_over(self, worker, device)
            else:
                worker.go(offer)
        found = [self.workers.get(name) for name in self.records[offer].workers]
        if any(worker is None or worker.failed or worker.hung_since_s is not None for worker in found):
            self.undisturbed = False  # it had lost a member before it served

    def park_somebody(self) -> None:
        """Somebody notices that a member of its generation is lost."""
        stuck = [w for w in self.workers.values() if w.runs and self._sees_a_loss(w.serving)]
        if stuck:
            self.order.choice(stuck).parked = "a peer was lost"

    def check(self) -> None:
        """What holds at every moment."""
        stepping = {g for g in self.running() if self.steps(g)}
        members = Counter(worker for g in stepping for worker in self.records[g].layout.devices)
        must(max(members.values(), default=0) < 2, f"C10: generations {stepping} run at once")
        must(bool(stepping) or not self.undisturbed, "C10: nobody serves, though nothing happened to the generation")
        self.latest = max(self.latest, *stepping, 0)
        self.undisturbed = self.undisturbed or self.latest in stepping
        for pool in self.owners.values():
            pool.check()


def _one_call(under_way: Deed) -> Deed:
    """The rest of a deed up to the controller's next turn in it."""
    for moment in under_way:
        if moment == BETWEEN:
            return
        yield moment
