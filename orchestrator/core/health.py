"""Questions to a snapshot: who runs, what is broken, what is missing. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...workers.generation import kv_key
from .facts import Fill, Park, Prepare, Snapshot, StartOwner, WorkerFact
from .layout import Layout
from .state import Record, State


class KVSize(NamedTuple):
    """Pages in a device's KV extent, and the blocks that it shall have. What is mapped may differ for a while."""

    device: str
    pool: str
    worker: str
    pages: int
    block_pages: int
    target: int

    @property
    def target_pages(self) -> int:
        return self.target * self.block_pages


def usable(snapshot: Snapshot, worker: str) -> WorkerFact | None:
    """A worker's facts, unless it is dead or has to be ended."""
    fact = snapshot.workers.get(worker)
    return fact if fact is not None and not fact.failed else None


def joins(snapshot: Snapshot, worker: str, generation: int) -> bool:
    """Whether a worker has prepared a generation, or may still come to do so: it has not been told to abandon it."""
    fact = usable(snapshot, worker)
    if fact is None:
        return False
    asked = Prepare(worker, generation) in snapshot.busy and fact.abandoned < generation
    return asked or generation in fact.prepared | fact.joining


def broken(record: Record, snapshot: Snapshot, *also: int) -> str:
    """Why this generation cannot go on: a member is gone, failed or parked; empty if it can.

    A member that runs one of the generations ``also`` has gone there.
    """
    reasons = []
    for rank, worker in enumerate(record.workers):
        fact = snapshot.workers.get(worker)
        why = _why_out(fact, (record.id, *also))
        if why:
            # Those that lost a peer only say so; the one that was lost comes first.
            follows = fact is not None and not fact.failed
            reasons.append((follows, f"worker {rank} ({record.layout.seats[rank].device}): {why}"))
    return min(reasons, default=(False, ""))[1]


def _why_out(fact: WorkerFact | None, generations: tuple[int, ...]) -> str:
    if fact is None:
        return "its process ended"
    if fact.failed or fact.parked:
        return fact.failed or fact.parked
    return "" if fact.serving in generations else "it has left"


def unaware(state: State, snapshot: Snapshot) -> Iterator[Park]:
    """Members that may wait, for as long as their exchange lets them, for one that is lost.

    Between machines nothing says that one has fallen silent. On one machine everybody knows who has died.
    """
    for record in (state.left, state.serving, state.pending.record if state.pending is not None else None):
        if record is None or not needs_store(record.layout):
            continue
        facts = {worker: usable(snapshot, worker) for worker in record.workers}
        here = {worker: fact for worker, fact in facts.items() if fact is not None and fact.serving == record.id}
        broken = record is state.serving and state.broken  # some may never have come, and wait for the next one
        if broken or None in facts.values() or any(fact.parked for fact in here.values()):
            yield from (Park(worker, record.id) for worker, fact in here.items() if not fact.parked)


def filled(record: Record, snapshot: Snapshot) -> bool:
    """Everything that has to be there before members can prepare is there, and nobody has still to be ended."""
    if needs_store(record.layout) and snapshot.store is None:
        return False
    if any(fact.failed for fact in snapshot.workers.values()):
        return False  # a hung worker might wake and write into the KV that another one takes over
    if any(worker not in snapshot.workers for worker in record.workers):
        return False
    pools = [snapshot.pools.get(pool) for pool in record.layout.pools]
    if any(fact is not None and (fact.failed or fact.stale) for fact in pools):
        return False  # members would wait for its pages in vain
    return not any(missing(record, snapshot))


def needs_store(layout: Layout) -> bool:
    """Whether its members meet at a store."""
    return layout.exchange in ("gloo", "nccl")


def missing(record: Record, snapshot: Snapshot) -> Iterator[StartOwner | Fill]:
    """Owners and extents that the generation needs and that are not there."""
    yield from missing_pools(record, snapshot)
    for pool, requests in record.layout.extents(record.id).items():
        fact = snapshot.pools.get(pool)
        if fact is not None and any(request.key not in fact.pages for request in requests):
            yield Fill(pool, requests)


def missing_pools(record: Record, snapshot: Snapshot) -> Iterator[StartOwner]:
    """Owners that the generation needs and that do not live, though their node does."""
    for pool, node in record.layout.pools.items():
        if pool not in snapshot.pools and node in snapshot.nodes:
            yield StartOwner(pool, node, record.layout.pool_pages(pool))


def kv_target(state: State, device: str) -> int | None:
    """KV blocks that a device of the serving generation shall have now; None if it has no part in it.

    While experts come, room for old and new ones together is needed where a device has memory of its own.
    """
    assert state.serving is not None
    now, pending = state.serving.layout, state.pending
    if device not in now.devices:
        return None
    if pending is None or pending.doomed or device not in pending.record.layout.devices:
        return now.kv_blocks(now.devices.index(device))
    blocks = pending.record.layout.kv_blocks_coming_from(now, device)
    return min(blocks, now.kv_blocks(now.devices.index(device)))


def kv_sizes(state: State, snapshot: Snapshot) -> Iterator[KVSize]:
    """KV of every device of the serving generation whose pool is there."""
    assert state.serving is not None
    layout = state.serving.layout
    for rank, (device, worker) in enumerate(zip(layout.devices, state.serving.workers, strict=True)):
        pool, target = snapshot.pools.get(layout.device_pool(rank)), kv_target(state, device)
        if pool is not None and target is not None:
            pages = len(pool.pages.get(kv_key(device), ()))
            yield KVSize(device, layout.device_pool(rank), worker, pages, layout.memory.kv_block_pages, target)
