"""One decision: from the state and a snapshot to the next state and what to do about it.

Level-triggered: what is done follows from what is missing, never from an event. Called again with the same snapshot
it asks for the same effects, less those under way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from .attempts import ATTEMPTS, RECOVERIES, broke, failed, mended, opens_s, standbys_open_s
from .coming import coming
from .doom import doom
from .facts import (
    Abandon,
    Commit,
    Effect,
    Fill,
    Free,
    HandOver,
    Prepare,
    ResizeKV,
    Snapshot,
    StopOwner,
    StopWorker,
)
from .health import broken, filled, joins, missing, missing_pools, unaware, usable
from .layout import Layout
from .leftovers import leftovers, resizes, standbys, strays, yields
from .operations import ahead, committed, end, next_layout
from .state import Pending, Record, Stage, State
from .survive import survive


@dataclass(frozen=True, slots=True)
class Decision:
    """The next state, effects to start now, and why; and until when something else is put off (`inf`: nothing is)."""

    state: State
    effects: tuple[Effect, ...]
    reason: str
    again_s: float = inf


def step(state: State, snapshot: Snapshot) -> Decision:
    """Decide what to do next."""
    if not state.failure:
        state = _finish(_begin(_advance(_withdraw(doom(state, snapshot), snapshot), snapshot), snapshot), snapshot)
    if state.failure:
        return Decision(state, (), state.failure)
    state, effects = _effects(state, snapshot)
    wanted = tuple(e for e in dict.fromkeys(effects) if e not in snapshot.busy)
    pauses_s = (opens_s(state), standbys_open_s(state)) if state.pending is None else ()
    return Decision(state, wanted, _reason(state), min((p for p in pauses_s if p > snapshot.now_s), default=inf))


def _withdraw(state: State, snapshot: Snapshot) -> State:
    """Once everybody has let go of a doomed generation: forward if somebody has switched to it, else back."""
    pending = state.pending
    if pending is None or not pending.doomed or not _let_go(pending.record.id, snapshot):
        return state
    if _has_begun(state, pending.record, snapshot):
        return _serves(state, pending.record, snapshot)
    state = failed(replace(state, pending=None), snapshot.now_s)
    if state.serving is None or pending.recovery:
        given_up = state.attempts >= RECOVERIES if pending.recovery else pending.lasting or state.attempts >= ATTEMPTS
        return _fail(state, pending.doomed, snapshot) if given_up else state
    if state.operation is None or pending.record.layout not in state.operation.route:
        return replace(state, attempts=0)  # it was withdrawn because it was asked for no more
    if pending.lasting or state.attempts >= ATTEMPTS:
        return replace(end(state, "failed", pending.doomed, snapshot.now_s), attempts=0)
    return state


def _serves(state: State, record: Record, snapshot: Snapshot) -> State:
    """The coming generation is the one that serves now."""
    now_s, before = snapshot.now_s, state.serving
    left = before if before is not None and not set(before.workers) & set(record.workers) else None
    state = replace(
        state, left=left, serving=record, pending=None, served_since_s=now_s, broken=False, standby_starts=0
    )
    return committed(state, now_s)


def _has_begun(state: State, record: Record, snapshot: Snapshot) -> bool:
    """Whether a worker has left the serving generation for this one. Those that had no role before do not count."""
    movers = record.workers if state.serving is None else state.serving.workers
    facts = [usable(snapshot, worker) for worker in movers]
    return any(fact is not None and fact.serving == record.id for fact in facts)


def _fail(state: State, reason: str, snapshot: Snapshot) -> State:
    return replace(end(state, "failed", reason, snapshot.now_s), failure=reason)


def _let_go(generation: int, snapshot: Snapshot) -> bool:
    """Nobody can come to the generation any more, and everyone's word about it is from after that."""
    if any(isinstance(e, Commit | Abandon) and e.generation == generation for e in snapshot.busy):
        return False
    facts = [fact for fact in snapshot.workers.values() if not fact.failed]
    return not any(fact.stale for fact in facts) and not any(joins(snapshot, w, generation) for w in snapshot.workers)


def _advance(state: State, snapshot: Snapshot) -> State:
    """Move the coming generation to the stage that the snapshot allows."""
    pending = state.pending
    if pending is None or pending.doomed:
        return state
    record, facts = pending.record, [usable(snapshot, w) for w in pending.record.workers]
    if all(fact is not None and fact.serving == record.id and not fact.parked for fact in facts):
        return replace(_serves(state, record, snapshot), attempts=0)
    return replace(state, pending=replace(pending, stage=_stage(state, pending, snapshot)))


def _stage(state: State, pending: Pending, snapshot: Snapshot) -> Stage:
    record, stage = pending.record, pending.stage
    if stage in (Stage.YIELD, Stage.FILL) or (stage is Stage.PREPARE and any(missing(record, snapshot))):
        stage = Stage.YIELD if any(yields(state, snapshot)) else Stage.FILL
    if stage is Stage.FILL and filled(record, snapshot):
        stage = Stage.PREPARE
    facts = [snapshot.workers.get(w) for w in record.workers]
    if stage is Stage.PREPARE and all(f is not None and record.id in f.prepared | {f.serving} for f in facts):
        stage = Stage.COMMIT
    return stage


def _begin(state: State, snapshot: Snapshot) -> State:
    """Open a new generation: the serving one's successor if it is broken, else what the operation asks for."""
    if state.pending is not None or state.failure:
        return state
    reason = broken(state.serving, snapshot) if state.serving is not None else ""
    state = broke(state, snapshot.now_s) if reason else mended(state)
    if any(isinstance(e, Free | HandOver | ResizeKV | StopOwner) for e in snapshot.busy):
        return state  # it would plan on extents and pools that are about to go
    if reason:
        return _recover(state, snapshot, reason)
    state = _without_dead_nodes(state, snapshot)
    layout = next_layout(state)
    if state.serving is None and layout is None and state.operations:  # nobody can ask for anything before it serves
        return _fail(state, f"{state.operations[-1].outcome} {state.operations[-1].reason}", snapshot)
    if (
        layout is None
        or opens_s(state) > snapshot.now_s
        or (state.serving is not None and not _is_clear(state, snapshot))
    ):
        return state
    if state.serving is not None and (tight := layout.lacks_room_after(state.serving.layout)):
        reason = f"{tight} lacks memory to go there from what serves now, which it was not planned for; ask again"
        return end(state, "failed", reason, snapshot.now_s)
    return _open(state, layout, snapshot, recovery=False)


def _recover(state: State, snapshot: Snapshot, reason: str) -> State:
    assert state.serving is not None
    if state.short_lives >= RECOVERIES:
        return _fail(state, f"it breaks again and again; the last time: {reason}", snapshot)
    if opens_s(state) > snapshot.now_s:
        return state
    layout = survive(state.serving.layout, snapshot.nodes)
    if layout is None:  # for the moment: a node that is silent may be back
        state = failed(state, snapshot.now_s)
        lost = f"{reason}; the devices that are left do not hold the model"
        return _fail(state, lost, snapshot) if state.attempts >= RECOVERIES else state
    return _open(state, layout, snapshot, recovery=True)


def _without_dead_nodes(state: State, snapshot: Snapshot) -> State:
    """An operation whose goal counts on a node that is gone has failed; if only its way does, it goes there at once."""
    operation = state.operation
    if operation is None:
        return state
    if gone := sorted(set(operation.goal.nodes) - snapshot.nodes):
        return end(state, "failed", f"node {gone[0]} is gone", snapshot.now_s)
    if any(not set(layout.nodes) <= snapshot.nodes for layout in ahead(state)):
        operation = replace(operation, route=(operation.goal,))
    return replace(state, operations=(*state.operations[:-1], operation))


def _open(state: State, layout: Layout, snapshot: Snapshot, *, recovery: bool) -> State:
    workers, next_worker = _cast(state, layout, snapshot)
    record = Record(state.next_generation, layout, workers)
    state = replace(
        state,
        pending=Pending(record, Stage.YIELD, recovery),
        next_generation=state.next_generation + 1,
        next_worker=next_worker,
    )
    return _advance(state, snapshot)


def _cast(state: State, layout: Layout, snapshot: Snapshot) -> tuple[tuple[str, ...], int]:
    """A worker for every rank: who sits there now, else a standby of that node, else a new one."""
    sitting = {}
    if state.serving is not None:
        seated = zip(state.serving.layout.devices, state.serving.workers, strict=True)
        facts = {device: (w, usable(snapshot, w)) for device, w in seated}
        sitting = {device: w for device, (w, fact) in facts.items() if fact is not None and not fact.retired}
    taken = {*sitting.values(), *(e.worker for e in snapshot.busy if isinstance(e, Prepare | StopWorker))}
    idle = [w for w, fact in sorted(snapshot.workers.items()) if fact.idle and w not in taken]
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


def _finish(state: State, snapshot: Snapshot) -> State:
    """An operation is done when its goal serves and what it left behind is cleared away."""
    if state.pending is not None or state.operation is None or state.broken:
        return state
    state = committed(state, snapshot.now_s)
    if state.operation is None or not state.operation.committed_s or next_layout(state) is not None:
        return state  # its goal has not served yet, or a recovery has led away from it since
    if not _is_clear(state, snapshot):
        return state
    busy = any(isinstance(e, Free | HandOver | ResizeKV | Abandon) for e in snapshot.busy)
    if busy or any(resizes(state, snapshot)):
        return state
    return end(replace(state, left=None), "done", "", snapshot.now_s)


def _is_clear(state: State, snapshot: Snapshot) -> bool:
    """Whether nothing is there beside what serves, and nothing is about to appear."""
    assert state.serving is not None
    if any(missing_pools(state.serving, snapshot)) or any(isinstance(e, Fill) for e in snapshot.busy):
        return False
    return not any(leftovers(state, snapshot))


def _effects(state: State, snapshot: Snapshot) -> tuple[State, list[Effect]]:
    effects: list[Effect] = [StopWorker(w) for w, fact in sorted(snapshot.workers.items()) if fact.failed]
    effects += [StopOwner(pool) for pool, fact in sorted(snapshot.pools.items()) if fact.failed]
    effects += unaware(state, snapshot)
    if state.serving is not None:
        effects += missing_pools(state.serving, snapshot)
    if state.pending is not None:
        return state, effects + list(coming(state, state.pending, snapshot))
    if state.serving is None:
        return state, effects
    if state.broken:
        return state, effects + list(strays(state, snapshot))  # the rest has time until it has recovered
    # An heir's KV grows by what it takes over: its size is left alone meanwhile.
    resizing, taking = (any(isinstance(e, kind) for e in snapshot.busy) for kind in (ResizeKV, HandOver))
    effects += (e for e in leftovers(state, snapshot) if not (resizing and isinstance(e, HandOver)))
    clear = _is_clear(state, snapshot)
    if clear and not taking and next_layout(state) is None:  # what comes next would have KV yield again
        effects += resizes(state, snapshot)
    if state.operation is not None:
        return state, effects  # processes that start would take the time that it needs
    state, changes = standbys(state, snapshot, pools=clear)
    return state, effects + changes


def _reason(state: State) -> str:
    pending, serving = state.pending, state.serving
    if pending is not None:
        told = f"withdrawn: {pending.doomed}" if pending.doomed else pending.stage.value
        return f"generation {pending.record.id}: {told}"
    if state.broken and serving is not None:
        return f"generation {serving.id} is broken; the next one follows"
    now = f"generation {serving.id} serves" if serving is not None else "no target"
    return f"{now}; attempt {state.attempts + 1} of {ATTEMPTS} follows" if state.operation and state.attempts else now
