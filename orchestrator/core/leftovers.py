"""What no generation needs any more, and what a serving one should have beside itself. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from ...workers.generation import LEDGER_KEY, kv_key
from .attempts import standbys_open_s, standbys_started
from .facts import (
    Abandon,
    Commit,
    Effect,
    Free,
    HandOver,
    ResizeKV,
    Snapshot,
    StartOwner,
    StartWorker,
    StopOwner,
    StopWorker,
)
from .health import kv_sizes, missing_pools, usable
from .layout import Seat, own_pool
from .state import Record, State

_KV = kv_key("")


def leftovers(state: State, snapshot: Snapshot) -> Iterator[Effect]:
    """Steps towards nothing being there that the serving generation does not need. None is left when it is so."""
    yield from strays(state, snapshot)
    yield from _hand_overs(state, snapshot)
    assert state.serving is not None
    yield from unneeded(snapshot, state.serving)
    yield from _outlived(state.serving, snapshot)


def _outlived(serving: Record, snapshot: Snapshot) -> Iterator[Free]:
    """KV of devices that serve, in other pools than theirs: of a node that was silent while they came to another."""
    layout = serving.layout
    own = {kv_key(device): layout.device_pool(rank) for rank, device in enumerate(layout.devices)}
    for pool, fact in sorted(snapshot.pools.items()):
        keys = tuple(sorted(key for key in fact.pages if own.get(key, pool) != pool))
        if keys:
            yield Free(pool, keys)


def strays(state: State, snapshot: Snapshot) -> Iterator[Effect]:
    """Workers that still have to do with generations other than the one that serves and the one that is coming."""
    assert state.serving is not None
    coming = state.pending.record.id if state.pending is not None else 0
    for worker, fact in sorted(snapshot.workers.items()):
        if fact.failed:
            continue
        yield from (Abandon(worker, g) for g in sorted((fact.prepared | fact.joining) - {coming}))
        if worker in state.serving.workers or fact.serving == coming:
            continue
        if fact.serving > state.serving.id:
            yield StopWorker(worker)  # it came to a generation that was withdrawn before anybody else did
        elif fact.parked:
            yield Commit(worker, state.serving.id)  # it missed the switch: it has no part in it, and retires
        elif 0 < fact.serving < state.serving.id and state.pending is None and not state.broken:
            yield Commit(worker, state.serving.id)  # nobody was there whom it could have switched with


def _hand_overs(state: State, snapshot: Snapshot) -> Iterator[Effect]:
    """KV of devices that have left, each with an heir."""
    assert state.serving is not None
    layout = state.serving.layout
    left: dict[str, str] = {}
    nodes: dict[str, str] = {}
    for worker, fact in sorted(snapshot.workers.items()):
        if worker not in state.serving.workers and fact.retired and not fact.failed:
            left[fact.device] = ""
            nodes[fact.device] = fact.node
    for pool, pool_fact in sorted(snapshot.pools.items()):
        for key in sorted(pool_fact.pages):
            if key.startswith(_KV) and key.removeprefix(_KV) not in layout.devices:
                left[key.removeprefix(_KV)] = pool
                nodes[key.removeprefix(_KV)] = pool_fact.node
    unseen = any(missing_pools(state.serving, snapshot))  # where there may be more KV
    running = {f.device for f in snapshot.workers.values() if f.serving and not f.failed}
    under_way = {e.device for e in snapshot.busy if isinstance(e, HandOver)}
    for device, pool in sorted(left.items()):
        if device in running - set(layout.devices) or device in under_way:
            continue  # it has not left yet, or what is left of it is on its way
        if not pool and unseen:
            continue
        yield HandOver(device, pool, _heir(state.serving, device, nodes[device]))


def _heir(serving: Record, device: str, node: str) -> str:
    """A worker of the same node if there is one. Several devices are shared out, the same way whenever it is asked."""
    near = [w for seat, w in zip(serving.layout.seats, serving.workers, strict=True) if seat.node == node]
    candidates = near or serving.workers
    return candidates[sum(device.encode()) % len(candidates)]


def heirs_at_switch(state: State) -> dict[str, str]:
    """Workers that take the KV of running sequences over as the coming generation comes, by the device that leaves.

    They serve already, so that clients know the way; and nobody parks, so that there is a common boundary.
    """
    serving, pending = state.serving, state.pending
    if serving is None or pending is None or pending.recovery:
        return {}
    leaving = [seat for seat in serving.layout.seats if seat.device not in pending.record.layout.devices]
    heirs = {seat.device: _heir(pending.record, seat.device, seat.node) for seat in leaving}
    return {device: worker for device, worker in heirs.items() if worker in serving.workers}


def unneeded(snapshot: Snapshot, *records: Record) -> Iterator[Free]:
    """Extents, except KV, that none of these generations needs."""
    wanted = [record.layout.extents(record.id) for record in records]
    for pool, fact in sorted(snapshot.pools.items()):
        keep = {request.key for extents in wanted for request in extents.get(pool, ())}
        gone = sorted(k for k in fact.pages if k not in keep and k != LEDGER_KEY and not k.startswith(_KV))
        if gone:
            yield Free(pool, tuple(gone))


def resizes(state: State, snapshot: Snapshot) -> Iterator[Effect]:
    """KV caches that are smaller or larger than the layout says, or whose extent is.

    While one is too large none grows: others may need its memory.
    """
    shrinking: list[ResizeKV] = []
    growing: list[ResizeKV] = []
    for kv in kv_sizes(state, snapshot):
        fact = usable(snapshot, kv.worker)
        if fact is not None and (fact.kv_blocks, kv.pages) != (kv.target, kv.target_pages):
            larger = fact.kv_blocks > kv.target or kv.pages > kv.target_pages
            (shrinking if larger else growing).append(ResizeKV(kv.worker, kv.target))
    yield from shrinking or growing


def yields(state: State, snapshot: Snapshot) -> Iterator[Effect]:
    """KV that must be given up before experts come; on a shared memory where the same layout comes again, none do."""
    serving, pending = state.serving, state.pending
    again = serving is not None and pending is not None and pending.record.layout == serving.layout
    whole = again and serving is not None and serving.layout.memory_mode == "shared"
    for kv in kv_sizes(state, snapshot) if serving is not None else ():
        fact = usable(snapshot, kv.worker)
        if fact is None or fact.device != kv.device:  # one that was started anew maps nothing of it
            if kv.pages > kv.target_pages and not whole:
                yield Free(kv.pool, (kv_key(kv.device),))  # nobody is left to choose what to keep
        elif fact.kv_blocks > kv.target or kv.pages > kv.target_pages:
            yield ResizeKV(kv.worker, kv.target)


def standbys(state: State, snapshot: Snapshot, *, pools: bool) -> tuple[State, list[Effect]]:
    """Idle workers and, with ``pools``, memories as they should stand by. Starts pause where they are in vain."""
    named, effects = _standby_workers(state, snapshot)
    if pools:
        effects = [*_standby_pools(state, snapshot), *effects]
    starts = [e for e in effects if isinstance(e, StartOwner | StartWorker) and e not in snapshot.busy]
    if not starts:
        return state, effects
    if standbys_open_s(state) > snapshot.now_s:
        return state, [e for e in effects if e not in starts]
    return standbys_started(named, snapshot.now_s), effects


def _standby_workers(state: State, snapshot: Snapshot) -> tuple[State, list[Effect]]:
    """Keep so many idle workers on every node that serves; stop those that are too many."""
    assert state.serving is not None
    effects: list[Effect] = []
    for node in sorted({*state.serving.layout.nodes, *(f.node for f in snapshot.workers.values())}):
        idle = sorted(w for w, f in snapshot.workers.items() if f.idle and f.node == node)
        coming = sum(isinstance(e, StartWorker) and e.node == node for e in snapshot.busy)
        want = state.standbys if node in state.serving.layout.nodes and node in snapshot.nodes else 0
        effects += [StopWorker(w) for w in idle[want:]]
        for _ in range(want - len(idle) - coming):
            effects.append(StartWorker(f"worker-{state.next_worker}", node))
            state = replace(state, next_worker=state.next_worker + 1)
    return state, effects


def _standby_pools(state: State, snapshot: Snapshot) -> Iterator[StartOwner | StopOwner]:
    """Where devices have memories of their own: keep those that as many new devices would have, on whichever node."""
    assert state.serving is not None
    layout = state.serving.layout
    needed = layout.pools
    next_ones = islice(layout.inventory.free(layout.devices), state.standbys if layout.memory_mode == "separate" else 0)
    nodes = [node for node in layout.nodes if node in snapshot.nodes]
    wanted = {}
    for entry in next_ones:
        bound = entry.node in snapshot.nodes  # else to none, or to one by its address, which is not known here
        for node in [n for n in nodes if not bound or n == entry.node]:
            seat = Seat(entry.device, node, entry.kind)
            wanted[own_pool(seat)] = seat
    for pool, fact in sorted(snapshot.pools.items()):
        if pool not in needed and pool not in wanted and not set(fact.pages) - {LEDGER_KEY}:
            yield StopOwner(pool)
    ending = {e.pool for e in snapshot.busy if isinstance(e, StopOwner)}
    for pool, seat in wanted.items():
        if pool not in snapshot.pools and pool not in ending:
            yield StartOwner(pool, seat.node, layout.own_pool_pages(seat))
