"""Models and nodes to plan for, without a checkpoint."""

from __future__ import annotations

from typing import Any

from concertina.orchestrator.config import DeploymentConfig, EngineOptions
from concertina.orchestrator.core.layout import Layout
from concertina.orchestrator.hands import NodeInfo
from concertina.orchestrator.placing import even_loads, first_placement
from concertina.orchestrator.planning import Context, first_layout
from concertina.orchestrator.seating import further_seats, seat_workers
from concertina.orchestrator.sizing import ModelSizes
from concertina.planners.model import ModelSpec

MIB = 1 << 20
KIB64 = 65_536
SIZES = ModelSizes(expert_bytes=2 * KIB64, trunk_bytes=3 * KIB64, kv_block_bytes=KIB64)


class Hasty:
    """A clock by which every look takes half a second, so that planners give up soon, and always equally soon."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def __call__(self) -> float:
        self._now_s += 0.5
        return self._now_s


def context(*nodes: NodeInfo, layers: int = 2, experts: int = 8, length_blocks: int = 4, **config: Any) -> Context:
    """Experts of two pages of 64 KiB, KV blocks of one; 64 MiB on a node unless given."""
    spec = ModelSpec(layers, experts, expert_bytes=float(SIZES.expert_bytes), flops_per_token=3e6, hidden_bytes=256)
    engine = EngineOptions(max_running=4)
    given = nodes or (NodeInfo("node-a", "127.0.0.1", 4, 64 * MIB),)
    return Context(
        DeploymentConfig("x", engine=engine, **config), spec, SIZES, length_blocks, given, even_loads(spec), Hasty()
    )


def layout_of(context: Context, workers: int) -> Layout:
    """What a deployment starts with."""
    seats = further_seats((), workers, context) if context.config.fleet else seat_workers(context.nodes, workers)
    return first_layout(context, seats, first_placement(context.site(seats), context.loads, context.now))
