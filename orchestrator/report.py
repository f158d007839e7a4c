"""What workers, owners and the state say, as what a deployment says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from ..errors import InternalError
from ..workers.generation import kv_key
from ..workers.roles import WorkerReport
from .cluster import Cluster, Member, Pool
from .core.facts import Effect, HandOver
from .core.state import Operation, Record, State
from .status import MemberList, OperationStatus, PoolStatus, WorkerAddress, WorkerStatus

_ANSWER_S = 1.0


def worker_statuses(record: Record, members: Mapping[str, Member]) -> tuple[WorkerStatus, ...]:
    """One status per rank of the generation; a worker that is gone is shown as lost."""
    gone = WorkerReport("", 0, frozenset(), 0, "its process ended")
    reports = [members[w].report if w in members else gone for w in record.workers]
    return tuple(_status(record, rank, reports) for rank in range(len(reports)))


def _status(record: Record, rank: int, reports: Sequence[WorkerReport]) -> WorkerStatus:
    report, stats, seat = reports[rank], reports[rank].stats, record.layout.seats[rank]
    return WorkerStatus(
        rank=rank,
        device=seat.device,
        node=seat.node,
        pid=report.pid,
        state=_state(report, record),
        experts_per_layer=tuple(len(layer[rank]) for layer in record.layout.placement.experts_LD),
        load=report.load,
        prompt_tokens=stats.prompt_tokens,
        generated_tokens=stats.generated_tokens,
        routed_tokens=round(_routed(record, rank, reports)),
        steps=stats.steps,
        kind=seat.kind.name,
        kv_copied_bytes=report.kv_copied_bytes,
    )


def _state(report: WorkerReport, record: Record) -> str:
    if report.failed:
        return "lost" if not report.pid else "failed"
    if report.parked:
        return "parked"
    return "serving" if report.serving == record.id else "preparing"


def _routed(record: Record, rank: int, reports: Sequence[WorkerReport]) -> float:
    """All members' choices of this rank's experts; replicas are credited by their shares."""
    total = 0.0
    for layer, experts in enumerate(record.layout.placement.replicas_LE):
        for expert, replicas in enumerate(experts):
            share = sum(r.share for r in replicas if r.device == rank)
            if share:
                total += share * sum(r.counts_LE[layer][expert] for r in reports if r.counts_LE)
    return total


async def pool_statuses(cluster: Cluster) -> tuple[PoolStatus, ...]:
    """Pages of every pool by purpose; a pool whose owner has just died, or gives no answer, is left out."""
    told = await asyncio.gather(*(_pool_status(name, pool) for name, pool in sorted(cluster.pools.items())))
    return tuple(status for status in told if status is not None)


async def _pool_status(name: str, pool: Pool) -> PoolStatus | None:
    try:
        async with asyncio.timeout(_ANSWER_S):
            usage, told = await asyncio.gather(pool.handle.usage(), pool.handle.report(pool.version))
    except (InternalError, TimeoutError):
        return None
    loaded, copied = told.loaded_bytes, told.copied_bytes
    return PoolStatus(name, pool.node, pool.config.page_bytes, pool.config.pages, usage, loaded, copied)


def member_list(
    state: State, cluster: Cluster, busy: Iterable[Effect], heirs: Mapping[str, str], version: int
) -> MemberList:
    """Workers that take requests: those of the generation, and those that left it and still hold sequences.

    A device that has left without a worker is awaited until its KV has an heir.
    """
    members = cluster.workers
    record = state.serving
    if record is None or state.failure:
        return MemberList(version)
    listed, awaited = [], []
    fastest = max(seat.kind.flops for seat in record.layout.seats)
    for worker, seat in zip(record.workers, record.layout.seats, strict=True):
        member, device = members.get(worker), seat.device
        if member is None or member.report.failed or member.report.address is None:
            awaited.append(device)
        else:
            speed = seat.kind.flops / fastest
            listed.append(WorkerAddress(worker, *member.report.address, device, speed=speed))
    for worker, member in members.items():
        if worker not in record.workers and member.report.address is not None and member.report.device:
            listed.append(WorkerAddress(worker, *member.report.address, member.report.device, draining=True))
    handed_over = {effect.device for effect in busy if isinstance(effect, HandOver)}
    left = (_devices_with_kv(cluster) | handed_over) - {address.device for address in listed} - _devices(state)
    return MemberList(version, tuple(listed), frozenset(awaited) | left, dict(heirs))


def _devices_with_kv(cluster: Cluster) -> frozenset[str]:
    keys = [key for pool in cluster.pools.values() for key in pool.pages]
    return frozenset(key.removeprefix(kv_key("")) for key in keys if key.startswith(kv_key("")))


def _devices(state: State) -> set[str]:
    """Those of the generation that serves, and of the one that is coming."""
    records = [state.serving, state.pending.record if state.pending is not None else None]
    return {device for record in records if record is not None for device in record.layout.devices}


def operation_status(
    operation: Operation, phase: str, begin_s: float, moved: tuple[int, int] = (0, 0), trouble: str = ""
) -> OperationStatus:
    """An operation as others see it, in seconds since the deployment began; ``moved`` are bytes done and in all.

    ``trouble`` is what keeps one that is under way from its end.
    """
    running = operation.outcome == "running"
    if running and operation.committed_s:
        phase = "clearing up"
    return OperationStatus(
        id=operation.id,
        kind=operation.kind,
        text=operation.text,
        state=operation.outcome,
        phase=phase if running else "",
        reason=operation.reason or (trouble if running else ""),
        started_s=operation.started_s - begin_s,
        committed_s=operation.committed_s - begin_s if operation.committed_s else 0.0,
        ended_s=operation.ended_s - begin_s if operation.ended_s else 0.0,
        bytes_done=moved[0],
        bytes_total=moved[1],
    )
