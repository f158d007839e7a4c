"""From a configuration, a model and the nodes there are to a layout. Pure, but for reading the placement file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from ..errors import OperatorError
from ..planners.placement import Placement
from ..planners.solution import Clock
from ..workers.exchange.layout import region_bytes
from ..workers.generation import ExchangeKind
from ..workers.model_files import ModelFiles
from ..workers.pages.sizing import choose_page_bytes, pages_for
from .config import DeploymentConfig
from .core.layout import Layout, Seat
from .hands import NodeInfo
from .placing import Site, even_loads, first_placement
from .planfiles import model_spec, read_loads, read_placement
from .sizing import MemoryLimits, ModelSizes, plan_memory

MAILBOX_BYTES = 256 << 10


def max_model_len(config: DeploymentConfig, model: ModelFiles) -> int:
    """Most tokens of a sequence: what the operator or the model allows.

    Raises
    ------
    OperatorError
        The operator asks for more than the model's positions.
    """
    wanted, most = config.engine.max_model_len, model.config.max_positions
    if wanted is not None and wanted > most:
        raise OperatorError(f"max-model-len: {wanted} is beyond the model's {most} positions")
    return wanted or most


def seat_workers(nodes: Sequence[NodeInfo], workers: int) -> tuple[Seat, ...]:
    """Spread workers over nodes in proportion to cores, the next one where most cores per worker are left."""
    if not nodes:
        raise OperatorError("cluster: no node is alive")
    taken: Counter[str] = Counter()
    for _ in range(workers):
        taken[max(nodes, key=lambda n: (n.cpus / (taken[n.id] + 1), n.available_bytes)).id] += 1
    seats = [node.id for node in nodes for _ in range(taken[node.id])]
    return tuple(Seat(f"cpu-{rank}", node) for rank, node in enumerate(seats))


def fitting_placement(path: str, seats: Sequence[Seat], model: ModelFiles) -> Placement:
    """A placement file's placement, its devices renamed to the seats in order.

    Raises
    ------
    OperatorError
        The file is malformed or does not fit the model or the number of workers.
    """
    placement = read_placement(path)
    found = (len(placement.devices), placement.layers, placement.experts)
    expected = (len(seats), len(model.config.moe_layers), model.config.experts)
    if found != expected:
        raise OperatorError(
            f"{path}: is for {found[0]} devices, {found[1]} MoE layers and {found[2]} experts; "
            f"expected {expected[0]}, {expected[1]} and {expected[2]}"
        )
    return Placement(tuple(seat.device for seat in seats), placement.replicas_LE)


def planned_placement(config: DeploymentConfig, site: Site, now: Clock) -> Placement:
    """Where the planners put the experts, for the loads measured before if there are any."""
    known = config.loads_file is not None and os.path.exists(config.loads_file)
    loads = read_loads(str(config.loads_file), site.model) if known else even_loads(site.model)
    return first_placement(site, loads, now)


def exchange_kind(config: DeploymentConfig, seats: Sequence[Seat]) -> ExchangeKind:
    """How tokens travel: not at all, through shared memory on one node, else through gloo."""
    nodes = {seat.node for seat in seats}
    if len(seats) == 1:
        return "solo"
    if config.exchange == "shared" and len(nodes) > 1:
        raise OperatorError(f"exchange: shared memory does not reach across {len(nodes)} nodes; use auto or gloo")
    if config.exchange == "gloo" or len(nodes) > 1:
        return "gloo"
    return "shared"


def plan_layout(config: DeploymentConfig, model: ModelFiles, nodes: Sequence[NodeInfo], now: Clock) -> Layout:
    """Where everything of the first generation goes, and how much memory it gets.

    Raises
    ------
    OperatorError
        It does not fit, or the placement file is not for this model.
    """
    seats = seat_workers(nodes, config.workers)
    shape = (len(model.config.moe_layers), model.config.experts)
    site = Site(seats, model_spec(model.config), config.spare_slots)
    if config.placement_file is not None:
        placement = fitting_placement(config.placement_file, seats, model)
    else:
        placement = planned_placement(config, site, now)
    block_tokens = config.engine.block_tokens
    sizes = ModelSizes(model.expert_bytes, model.trunk_bytes, model.kv_block_bytes(block_tokens))
    experts = [sizes.expert_bytes] * (shape[0] * shape[1])
    page_bytes = choose_page_bytes([*experts, sizes.trunk_bytes, *[sizes.kv_block_bytes] * len(experts)])
    length_blocks = -(-max_model_len(config, model) // block_tokens)
    used = {seat.node for seat in seats}
    limits = MemoryLimits(
        config.device_memory_bytes,
        min(node.available_bytes for node in nodes if node.id in used),
        max(Counter(seat.node for seat in seats).values()),
        kv_blocks_wanted=config.engine.max_running * length_blocks,
        kv_blocks_needed=length_blocks,
        reserved_experts=site.slots * shape[0],
    )
    exchange = exchange_kind(config, seats)
    region = region_bytes(len(seats), MAILBOX_BYTES) if exchange == "shared" else 0
    return Layout(
        seats=seats,
        placement=placement,
        memory=plan_memory(sizes, page_bytes, placement, limits),
        memory_mode="shared",
        exchange=exchange,
        exchange_pages=pages_for(region, page_bytes) if region else 0,
        reserved_experts=site.slots * shape[0],
    )
