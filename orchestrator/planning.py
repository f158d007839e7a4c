"""From a configuration, a model and the nodes there are to a layout. Pure, but for reading the placement file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import OperatorError
from ..planners.model import Loads, ModelSpec
from ..planners.placement import Placement
from ..planners.solution import Clock
from ..workers.exchange.layout import region_bytes
from ..workers.generation import ExchangeKind
from ..workers.kv.ledger import record_bytes
from ..workers.model_files import ModelFiles
from ..workers.pages.sizing import choose_page_bytes, pages_for
from .config import DeploymentConfig
from .core.layout import Layout, Seat
from .hands import NodeInfo
from .placing import Site, even_loads, first_placement
from .planfiles import model_spec, read_loads, read_placement
from .room import check_nodes, with_pools
from .seating import first_seats
from .sizing import MemoryLimits, MemoryPlan, ModelSizes, plan_memory

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


@dataclass(frozen=True)
class Context:
    """What layouts of a deployment are planned for.

    Parameters
    ----------
    config : DeploymentConfig
    spec : ModelSpec
        The model as the planners see it.
    sizes : ModelSizes
    length_blocks : int
        KV blocks of one sequence of full length.
    nodes : tuple of NodeInfo
        Those that are alive. ``available_bytes`` is what the deployment may take in all, not what is left beside it.
    loads : Loads
        What every expert is asked for.
    now : callable
        Seconds; limits the planners.
    cordoned : frozenset of str
        Nodes that take no new devices.
    leavers : mapping of str to str
        Devices that are leaving already, and their nodes: their KV is being handed over.
    """

    config: DeploymentConfig
    spec: ModelSpec
    sizes: ModelSizes
    length_blocks: int
    nodes: tuple[NodeInfo, ...]
    loads: Loads
    now: Clock
    cordoned: frozenset[str] = frozenset()
    leavers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        config: DeploymentConfig,
        model: ModelFiles,
        nodes: Sequence[NodeInfo],
        now: Clock,
        loads: Loads | None = None,
    ) -> Context:
        """The context of a checkpoint; without ``loads``, those of the loads file or even ones.

        Raises
        ------
        OperatorError
            The loads file is malformed, or a sequence longer than the model's positions is asked for.
        """
        spec, block_tokens = model_spec(model.config), config.engine.block_tokens
        sizes = ModelSizes(model.expert_bytes, model.trunk_bytes, model.kv_block_bytes(block_tokens))
        blocks = -(-max_model_len(config, model) // block_tokens)
        return cls(config, spec, sizes, blocks, tuple(nodes), loads or known_loads(config, spec), now)

    def site(self, seats: Sequence[Seat]) -> Site:
        """What is planned for: only devices of a fleet, whose memories differ, are told how much each holds."""
        site = Site(seats, self.spec, self.config.spare_slots)
        if not self.config.fleet or self.config.device_bytes is None:
            return site
        page_bytes = page_size(self.sizes, self.spec.layers * self.spec.experts)
        layer_bytes = pages_for(self.sizes.expert_bytes, page_bytes) * page_bytes * self.spec.layers
        kv_pages = self.length_blocks * pages_for(self.sizes.kv_block_bytes, page_bytes) + 1  # parts are rounded down
        return replace(site, room=self.config.device_bytes / layer_bytes, kv_room=kv_pages * page_bytes / layer_bytes)

    def reserved_experts(self, seats: Sequence[Seat]) -> tuple[int, ...]:
        """By device: experts, summed over layers, for which it keeps room: as many as it may ever have to hold."""
        return tuple(min(slots, self.spec.experts) * self.spec.layers for slots in self.site(seats).slots_D)


def known_loads(config: DeploymentConfig, spec: ModelSpec) -> Loads:
    """Loads measured before, if there are any; else all experts are taken to be asked for alike."""
    if config.loads_file is not None and os.path.exists(config.loads_file):
        return read_loads(config.loads_file, spec)
    return even_loads(spec)


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


def exchange_pages(kind: ExchangeKind, workers: int, page_bytes: int) -> int:
    """Pages of the region through which so many workers exchange tokens; 0 where they need none."""
    return pages_for(region_bytes(workers, MAILBOX_BYTES), page_bytes) if kind == "shared" else 0


def device_memory(
    context: Context, seats: Sequence[Seat], placement: Placement, page_bytes: int, device_bytes: int | None
) -> MemoryPlan:
    """The memory of every device for this placement; ``device_bytes`` None takes a share of the smallest node.

    Raises
    ------
    OperatorError
        A device's experts and the KV of one full-length sequence do not fit, or a seat's node is gone.
    """
    available = {node.id: node.available_bytes for node in context.nodes}
    gone = sorted({seat.node for seat in seats} - set(available))
    if gone:
        raise OperatorError(f"cluster: node {gone[0]} is not alive")
    limits = MemoryLimits(
        device_bytes,
        min(available[seat.node] for seat in seats),
        max(Counter(seat.node for seat in seats).values()),
        kv_blocks_wanted=context.config.engine.max_running * context.length_blocks,
        kv_blocks_needed=context.length_blocks,
        reserved_experts=context.reserved_experts(seats),
        memory_parts=tuple(seat.kind.memory_part for seat in seats),
    )
    return plan_memory(context.sizes, page_bytes, placement, limits)


def page_size(sizes: ModelSizes, experts: int) -> int:
    """Bytes of a page that wastes little on so many experts, as many KV blocks and the trunk."""
    return choose_page_bytes([*[sizes.expert_bytes] * experts, sizes.trunk_bytes, *[sizes.kv_block_bytes] * experts])


def plan_layout(config: DeploymentConfig, model: ModelFiles, nodes: Sequence[NodeInfo], now: Clock) -> Layout:
    """Where everything of the first generation goes, and how much memory it gets.

    Raises
    ------
    OperatorError
        It does not fit, or the placement file is not for this model.
    """
    context = Context.of(config, model, nodes, now)
    seats = first_seats(context)
    if config.placement_file is not None:
        placement = fitting_placement(config.placement_file, seats, model)
    else:
        placement = first_placement(context.site(seats), context.loads, now)
    return first_layout(context, seats, placement)


def first_layout(context: Context, seats: tuple[Seat, ...], placement: Placement) -> Layout:
    """The layout of a deployment's first generation: page size and addresses hold for all that follow.

    Raises
    ------
    OperatorError
        It does not fit a device or a node.
    """
    config = context.config
    page_bytes = page_size(context.sizes, placement.layers * placement.experts)
    exchange = exchange_kind(config, seats)
    layout = Layout(
        seats=seats,
        placement=placement,
        memory=device_memory(context, seats, placement, page_bytes, config.device_bytes),
        memory_mode=config.memory_mode,
        exchange=exchange,
        exchange_pages=exchange_pages(exchange, len(seats), page_bytes),
        reserved_experts=context.reserved_experts(seats),
        ledger_record_bytes=record_bytes(config.engine.block_tokens),
        length_blocks=context.length_blocks,
        inventory=config.inventory,
    )
    check_nodes(layout, context.nodes)
    return with_pools(layout, context.nodes)
