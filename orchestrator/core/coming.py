"""What the coming generation needs next, stage by stage; or what its withdrawal needs. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from .facts import Abandon, Commit, Effect, Fill, Free, OpenStore, Prepare, Snapshot, StartOwner, StartWorker
from .health import joins, missing, needs_store, usable
from .layout import is_node_pool
from .leftovers import strays, unneeded, yields
from .state import Pending, Record, Stage, State


def coming(state: State, pending: Pending, snapshot: Snapshot) -> Iterator[Effect]:
    """What the coming generation needs next."""
    record = pending.record
    if state.serving is not None:
        yield from strays(state, snapshot)
    if pending.doomed:
        yield from _abandons(record.id, snapshot)
    elif pending.stage is Stage.YIELD:
        yield from yields(state, snapshot)
    elif pending.stage is Stage.FILL:
        yield from _missing(state, record, snapshot)
        for rank, worker in enumerate(record.workers):
            if worker not in snapshot.workers:
                yield StartWorker(worker, record.layout.seats[rank].node)
        if needs_store(record.layout) and snapshot.store is None:
            yield OpenStore()
    elif pending.stage is Stage.PREPARE:
        for worker in record.workers:
            if record.id not in snapshot.workers[worker].prepared | {snapshot.workers[worker].serving}:
                yield Prepare(worker, record.id)
    else:
        yield from _commits(state, pending, snapshot)


def _missing(state: State, record: Record, snapshot: Snapshot) -> Iterator[Effect]:
    """What is not there. A device's own memory is emptied of what an earlier attempt left before more comes."""
    frees = {e.pool: e for e in unneeded(snapshot, record, *([state.serving] if state.serving is not None else []))}
    under_way = {e.pool for e in snapshot.busy if isinstance(e, Fill | Free)}
    for effect in missing(record, snapshot):
        if isinstance(effect, StartOwner) or is_node_pool(effect.pool):
            yield effect
        elif effect.pool not in under_way:
            yield frees.get(effect.pool, effect)


def _abandons(generation: int, snapshot: Snapshot) -> Iterator[Effect]:
    if any(isinstance(e, Commit) and e.generation == generation for e in snapshot.busy):
        return  # an offer that is on its way would come after its withdrawal
    yield from (
        Abandon(worker, generation) for worker in sorted(snapshot.workers) if joins(snapshot, worker, generation)
    )


def _commits(state: State, pending: Pending, snapshot: Snapshot) -> Iterator[Effect]:
    """First those who have no role yet, then all others: they switch together, and everybody is there then.

    Where the old generation is broken, each goes as soon as it has stopped.
    """
    record = pending.record
    facts = {worker: usable(snapshot, worker) for worker in record.workers}
    todo = {worker: fact for worker, fact in facts.items() if fact is not None and fact.serving != record.id}
    joining = [worker for worker, fact in todo.items() if not fact.serving]
    if state.serving is not None and not joining:
        leaving = {w: usable(snapshot, w) for w in state.serving.workers if w not in record.workers}
        todo.update({worker: fact for worker, fact in leaving.items() if fact is not None and fact.serving})
    for worker, fact in todo.items():
        if fact.parked or not fact.serving or not (joining or pending.recovery):
            yield Commit(worker, record.id)
