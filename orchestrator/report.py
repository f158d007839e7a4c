"""What workers report as what a deployment says of its workers. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ..workers.roles import WorkerReport
from .core.state import Record
from .status import WorkerStatus


def worker_statuses(record: Record, reports: Sequence[WorkerReport]) -> tuple[WorkerStatus, ...]:
    """One status per rank; ``reports`` are those of the generation's workers, by rank."""
    return tuple(_status(record, rank, reports) for rank in range(len(reports)))


def _status(record: Record, rank: int, reports: Sequence[WorkerReport]) -> WorkerStatus:
    report, stats, seat = reports[rank], reports[rank].stats, record.layout.seats[rank]
    return WorkerStatus(
        rank=rank,
        device=seat.device,
        node=seat.node,
        pid=report.pid,
        state="failed" if report.failed else "serving" if report.serving == record.id else "preparing",
        experts_per_layer=tuple(len(layer[rank]) for layer in record.layout.placement.experts_LD),
        load=report.load,
        prompt_tokens=stats.prompt_tokens,
        generated_tokens=stats.generated_tokens,
        routed_tokens=round(_routed(record, rank, reports)),
        steps=stats.steps,
    )


def _routed(record: Record, rank: int, reports: Sequence[WorkerReport]) -> float:
    """All members' choices of this rank's experts; replicas are credited by their shares."""
    total = 0.0
    for layer, experts in enumerate(record.layout.placement.replicas_LE):
        for expert, replicas in enumerate(experts):
            share = sum(r.share for r in replicas if r.device == rank)
            if share:
                total += share * sum(r.counts_LE[layer][expert] for r in reports if r.counts_LE)
    return total
