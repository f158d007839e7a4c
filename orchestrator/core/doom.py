"""Why the generation that is coming is given up. Pure."""

from __future__ import annotations

from dataclasses import replace

from .facts import (
    Commit,
    Effect,
    Fault,
    Fill,
    OpenStore,
    Prepare,
    ResizeKV,
    Snapshot,
    StartOwner,
    StartWorker,
    WorkerFact,
)
from .health import broken, needs_store
from .state import Pending, Record, Stage, State


def doom(state: State, snapshot: Snapshot) -> State:
    """Give the coming generation up if something it needs failed or died."""
    pending = state.pending
    if pending is None or pending.doomed:
        return state
    for effect, fault in snapshot.errors.items():
        if _concerns(effect, pending):
            return _doomed(state, fault)
    trouble = _trouble(state, pending, snapshot)
    return _doomed(state, Fault(trouble)) if trouble else state


def _doomed(state: State, fault: Fault) -> State:
    assert state.pending is not None
    return replace(state, pending=replace(state.pending, doomed=fault.reason, lasting=fault.lasting))


def _concerns(effect: Effect, pending: Pending) -> bool:
    match effect:
        case Prepare(_, generation) | Commit(_, generation):
            return generation == pending.record.id
        case StartWorker(worker, _):
            return worker in pending.record.workers
        case StartOwner(pool) | Fill(pool):
            return pool in pending.record.layout.pools
        case OpenStore():
            return True
        case ResizeKV():
            return pending.stage is Stage.YIELD
        case _:
            return False


def _trouble(state: State, pending: Pending, snapshot: Snapshot) -> str:
    """Who of the members, or of those that serve until then, is lost."""
    record = pending.record
    gone = sorted(set(record.layout.nodes) - snapshot.nodes)
    if gone:
        return f"node {gone[0]} is gone"
    if pending.stage is Stage.PREPARE and needs_store(record.layout) and snapshot.store is None:
        return "the store at which its members meet ended with the controller"
    begun = pending.stage in (Stage.PREPARE, Stage.COMMIT)
    for rank, worker in enumerate(record.workers):
        fact = snapshot.workers.get(worker)
        where = f"worker {rank} ({record.layout.seats[rank].device})"
        if fact is None and begun:
            return f"{where}: its process ended"
        if fact is not None and fact.failed:
            return f"{where}: {fact.failed}"
        if fact is not None and fact.parked and fact.serving == record.id:
            return f"{where}: {fact.parked}"
    if state.serving is None or pending.recovery:
        return ""
    return broken(_still_there(state.serving, snapshot), snapshot, record.id)


def _still_there(record: Record, snapshot: Snapshot) -> Record:
    """The generation without the members that have left it in good order."""
    stay = [i for i, w in enumerate(record.workers) if not _has_retired(snapshot.workers.get(w))]
    layout = replace(record.layout, seats=tuple(record.layout.seats[i] for i in stay))
    return Record(record.id, layout, tuple(record.workers[i] for i in stay))


def _has_retired(fact: WorkerFact | None) -> bool:
    return fact is not None and fact.retired != 0 and not fact.failed
