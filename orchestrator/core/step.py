"""One decision: from the state, a snapshot and nothing else to the next state and what to do about it.

Level-triggered: what is done follows from what is missing, never from an event. Called again with the same snapshot
it asks for the same effects, less those under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .facts import (
    Commit,
    Effect,
    Fill,
    Free,
    OpenStore,
    Prepare,
    Snapshot,
    StartOwner,
    StartWorker,
    StopWorker,
    WorkerFact,
)
from .layout import Layout
from .state import Pending, Record, Stage, State


@dataclass(frozen=True, slots=True)
class Decision:
    """The next state, effects to start now, and why."""

    state: State
    effects: tuple[Effect, ...]
    reason: str


def step(state: State, snapshot: Snapshot) -> Decision:
    """Decide what to do next."""
    if state.failure:
        return Decision(state, (), state.failure)
    trouble = _trouble(state, snapshot)
    if trouble:
        return Decision(replace(state, failure=trouble), (), trouble)
    state = _advance(_begin(state, snapshot), snapshot)
    effects = [*_wanted(state, snapshot), *_leftovers(state, snapshot)]
    return Decision(state, tuple(e for e in effects if e not in snapshot.busy), _reason(state))


def _trouble(state: State, snapshot: Snapshot) -> str:
    """Why this cannot go on: a failed effect, or a member of a generation that is gone."""
    for error in snapshot.errors.values():
        return error
    if state.serving is None:
        return ""
    failed = []
    for rank, worker in enumerate(state.serving.workers):
        why = snapshot.workers.get(worker, WorkerFact("", failed="its process ended")).failed
        if why:
            failed.append(f"worker {rank} ({state.serving.layout.seats[rank].device}): {why}")
    # Those that lost a peer only say so; the one that was lost, or what it died of, comes first.
    return min(failed, key=lambda line: "PeerLost" in line, default="")


def _begin(state: State, snapshot: Snapshot) -> State:
    """Open a new generation where the target differs from what serves."""
    current = state.serving.layout if state.serving else None
    if state.pending or state.target is None or state.target == current:
        return state
    workers, next_worker = _cast(state, state.target, snapshot)
    record = Record(state.next_generation, state.target, workers)
    return replace(
        state,
        pending=Pending(record, Stage.FILL),
        next_generation=state.next_generation + 1,
        next_worker=next_worker,
    )


def _cast(state: State, layout: Layout, snapshot: Snapshot) -> tuple[tuple[str, ...], int]:
    """A worker for every rank: who sits there now, else an idle one of that node, else a new one."""
    sitting = {}
    if state.serving is not None:
        sitting = {s.device: w for s, w in zip(state.serving.layout.seats, state.serving.workers, strict=True)}
    idle = [w for w, fact in sorted(snapshot.workers.items()) if not fact.failed and w not in sitting.values()]
    cast, fresh = [], state.next_worker
    for seat in layout.seats:
        worker = sitting.get(seat.device)
        if worker is None:
            worker = next((w for w in idle if snapshot.workers[w].node == seat.node), None)
            if worker is not None:
                idle.remove(worker)
            else:
                worker, fresh = f"worker-{fresh}", fresh + 1
        cast.append(worker)
    return tuple(cast), fresh


def _advance(state: State, snapshot: Snapshot) -> State:
    """Move the coming generation to the stage that the snapshot allows."""
    pending = state.pending
    if pending is None:
        return state
    record, facts = pending.record, [snapshot.workers.get(w) for w in pending.record.workers]
    if all(fact is not None and fact.serving == record.id for fact in facts):
        return replace(state, serving=record, pending=None)
    if all(fact is not None and record.id in fact.prepared | {fact.serving} for fact in facts):
        return replace(state, pending=replace(pending, stage=Stage.COMMIT))
    if pending.stage is Stage.FILL and _filled(record, snapshot) and None not in facts:
        return replace(state, pending=replace(pending, stage=Stage.PREPARE))
    return state


def _filled(record: Record, snapshot: Snapshot) -> bool:
    if _needs_store(record) and snapshot.store is None:
        return False
    return not any(_missing(record, snapshot))


def _needs_store(record: Record) -> bool:
    return record.layout.exchange in ("gloo", "nccl")


def _missing(record: Record, snapshot: Snapshot) -> Iterator[Effect]:
    """Owners and extents that the generation needs and that are not there."""
    pools = record.layout.pools()
    for pool, requests in record.layout.extents(record.id).items():
        fact = snapshot.pools.get(pool)
        if fact is None:
            yield StartOwner(pool, pools[pool], record.layout.pool_pages(pool))
        elif any(request.key not in fact.pages for request in requests):
            yield Fill(pool, requests)


def _wanted(state: State, snapshot: Snapshot) -> Iterator[Effect]:
    """What the coming generation needs next."""
    if state.pending is None:
        return
    record, stage = state.pending.record, state.pending.stage
    if stage is Stage.FILL:
        yield from _missing(record, snapshot)
        for rank, worker in enumerate(record.workers):
            if worker not in snapshot.workers:
                yield StartWorker(worker, record.layout.seats[rank].node)
        if _needs_store(record) and snapshot.store is None:
            yield OpenStore()
    elif stage is Stage.PREPARE:
        yield from (Prepare(w, record.id) for w in record.workers if record.id not in _prepared(w, snapshot))
    else:
        yield from (Commit(w, record.id) for w in record.workers if snapshot.workers[w].serving != record.id)
        yield from (Commit(w, record.id) for w in _leaving(state, snapshot))


def _leaving(state: State, snapshot: Snapshot) -> list[str]:
    """Workers that still run the generation that serves and have no part in the one that is coming."""
    if state.serving is None or state.pending is None:
        return []
    staying = state.pending.record.workers
    gone = [w for w in state.serving.workers if w not in staying and w in snapshot.workers]
    return [w for w in gone if snapshot.workers[w].serving == state.serving.id]


def _prepared(worker: str, snapshot: Snapshot) -> frozenset[int]:
    fact = snapshot.workers.get(worker)
    return fact.prepared if fact else frozenset()


def _leftovers(state: State, snapshot: Snapshot) -> Iterator[Effect]:
    """Workers and extents that no generation needs any more."""
    if state.pending is not None or state.serving is None:
        return
    yield from (StopWorker(w) for w in sorted(set(snapshot.workers) - set(state.serving.workers)))
    wanted = state.serving.layout.extents(state.serving.id)
    for pool, fact in sorted(snapshot.pools.items()):
        keep = {request.key for request in wanted.get(pool, ())}
        gone = _sorted(key for key in fact.pages if key not in keep)
        if gone:
            yield Free(pool, gone)


def _sorted(keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(keys))


def _reason(state: State) -> str:
    if state.pending is not None:
        return f"generation {state.pending.record.id}: {state.pending.stage.value}"
    return f"generation {state.serving.id} serves" if state.serving else "no target"
