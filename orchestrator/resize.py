"""From the layout that serves to another one: more devices, fewer, other ones, or experts elsewhere. Pure.

Whatever a layout keeps, it keeps by name: a device that stays has the same worker, KV cache and node. What cannot be
is refused with the limit, what is needed and what there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ..errors import OperatorError
from ..planners.bounds import case_bound, count_bound
from ..planners.cluster import Cluster, Device
from ..planners.migrate import plan_migration
from ..planners.migration import Key, Migration, MigrationProblem, Phase
from ..planners.model import ModelSpec
from ..planners.placement import Placement, Replica
from ..planners.replan import ReplanRules, replan
from ..planners.solution import Infeasible, StoppingRule
from .core.layout import Layout, Seat, node_pool
from .planning import Context, device_memory, exchange_kind, exchange_pages
from .room import check_nodes, with_pools
from .seating import further_seats, nodes_called

# The operator waits for planning, and what serves shares the cores; the balancer improves on it later. Where all
# devices share one memory nothing is copied, and there is less to be found.
_TIME_LIMIT_S = 0.05
_SHARED_LIMIT_S = 0.01
_MOST_PER_CORE = 16  # more could only be a slip, and planning for them would take long


def resized(current: Layout, workers: int, context: Context) -> Layout:
    """The layout for so many workers that is near ``current``; ``current`` itself if it has as many.

    None of them is on a node that is cordoned or gone.

    Raises
    ------
    OperatorError
        There cannot be so many: their experts and KV do not fit, or the exchange does not reach.
    """
    if workers < 1:
        raise OperatorError(f"workers: {workers}; expected at least 1")
    usable = {node.id for node in context.nodes} - context.cordoned
    staying = tuple(seat for seat in current.seats if seat.node in usable)
    if workers == len(current.seats) == len(staying):
        return current
    cpus = sum(node.cpus for node in context.nodes)
    if workers > _MOST_PER_CORE * cpus:
        raise OperatorError(f"workers: {workers}; expected at most {_MOST_PER_CORE * cpus}, {_MOST_PER_CORE} per core")
    grown = workers > len(staying)
    seats = _added(staying, workers, current, context) if grown else _removed(staying, workers, context)
    return _moved(current, seats, context)


def drained(current: Layout, name: str, context: Context) -> Layout:
    """The layout without a device, or without all devices of a node; others keep their place if their node is there.

    A node that has all of them gives way to as many new ones on other nodes.

    Parameters
    ----------
    name : str
        A device, or a node: its id, at least four characters of its beginning, or its address.

    Raises
    ------
    OperatorError
        Nothing has that name, nothing would be left, or what is left cannot hold the model.
    """
    leaving = named_devices(current, name, context)
    if not leaving & set(current.devices):  # it has left
        return current
    alive = {node.id for node in context.nodes}  # what serves may not have recovered yet from losing one
    seats = tuple(seat for seat in current.seats if seat.device not in leaving and seat.node in alive)
    if not seats:
        node = named_node(current, name, context)
        if node and alive - set(context.cordoned) - {node}:
            shut = replace(context, cordoned=context.cordoned | {node})
            return _moved(current, _added((), len(current.seats), current, shut), shut)
        first = (
            "no other node can take workers: let one join, or undrain one (concertina undrain)"
            if node
            else f"start another one first (concertina scale --workers {len(current.seats) + 1})"
        )
        raise OperatorError(f"drain: without {name} no device would be left; {first}")
    return _moved(current, seats, context)


def rebalanced(current: Layout, context: Context) -> Layout:
    """Experts where the loads want them, on the same devices; ``current`` itself if none should move.

    Raises
    ------
    OperatorError
        The planners find no placement at all.
    """
    placement = _near(current, current.seats, context)
    if _holders(placement) == _holders(current.placement):
        return current
    return placed(current, placement, context)


def placed(current: Layout, placement: Placement, context: Context) -> Layout:
    """Experts placed otherwise on the same devices; raises `OperatorError` where their memory does not hold that."""
    return _with_placement(current, current.seats, placement, context)


def named_devices(current: Layout, name: str, context: Context) -> frozenset[str]:
    """The devices that a device's or node's name stands for, leavers included; raises as `named_node` does."""
    node = named_node(current, name, context)
    if not node:
        return frozenset({name})
    leaving = (device for device, at in context.leavers.items() if at == node)
    return frozenset((*(seat.device for seat in current.seats if seat.node == node), *leaving))


def named_node(current: Layout, name: str, context: Context) -> str:
    """The node that a name stands for; empty if it is a device's.

    Raises
    ------
    OperatorError
        None or several; lists what there is.
    """
    if name in current.devices or name in context.leavers:
        return ""
    hosts = {**dict.fromkeys(current.nodes, ""), **{node.id: node.host for node in context.nodes}}
    nodes = nodes_called(name, hosts)
    if len(nodes) == 1:
        return nodes[0]
    found = f"{len(nodes)} nodes are" if nodes else "no device or node is"
    raise OperatorError(
        f"drain: {found} called {name!r}; devices: {', '.join(current.devices)}; nodes: {', '.join(hosts)}"
    )


def _added(staying: tuple[Seat, ...], workers: int, current: Layout, context: Context) -> tuple[Seat, ...]:
    """New seats behind the old ones, as `further_seats` finds them."""
    return (*staying, *further_seats(staying, workers, context, taken=current.devices))


def _removed(seats: tuple[Seat, ...], workers: int, context: Context) -> tuple[Seat, ...]:
    """Those that a cluster file lists last go first; without one, those of the most crowded node, taken last first."""
    cpus = {node.id: node.cpus for node in context.nodes}
    inventory = context.config.inventory
    left = list(seats)
    while len(left) > workers:
        taken = Counter() if inventory.entries else Counter(seat.node for seat in left)
        crowding = {node: count / cpus[node] if cpus.get(node) else float("inf") for node, count in taken.items()}
        left.remove(max(left, key=lambda s: (crowding.get(s.node, 0.0), inventory.turn(s.device), s.device)))
    return tuple(left)


def _moved(current: Layout, seats: tuple[Seat, ...], context: Context) -> Layout:
    return _with_placement(current, seats, _near(current, seats, context), context)


def _near(current: Layout, seats: Sequence[Seat], context: Context) -> Placement:
    """A balanced placement on these seats that copies few bytes from the current one."""
    problem = context.site(seats).problem(context.loads, current.placement)
    one_memory = current.memory_mode == "shared" and len({seat.node for seat in (*current.seats, *seats)}) == 1
    limit_s, bound = (_SHARED_LIMIT_S, count_bound) if one_memory else (_TIME_LIMIT_S, case_bound)
    found = replan(problem, ReplanRules(bound=bound, stop=StoppingRule(time_limit_s=limit_s, now=context.now)))
    if isinstance(found, Infeasible):
        raise OperatorError(f"placement: {found}")
    return found.placement


def _with_placement(current: Layout, seats: tuple[Seat, ...], placement: Placement, context: Context) -> Layout:
    """The whole layout: memory and exchange follow from seats and placement; page size and addresses stay."""
    page_bytes = current.memory.page_bytes
    exchange = exchange_kind(context.config, seats)
    changed = replace(
        current,
        seats=seats,
        placement=placement,
        memory=device_memory(context, seats, placement, page_bytes, _device_bytes(current, context)),
        exchange=exchange,
        exchange_pages=exchange_pages(exchange, len(seats), page_bytes),
        reserved_experts=context.reserved_experts(seats),
    )
    layout = with_pools(changed, context.nodes)
    # In separate mode a device never exceeds its own memory: KV cache yields to experts of two placements.
    check_nodes(layout, context.nodes, current if layout.memory_mode == "shared" else None)
    _check_addresses(layout)
    return layout


def _device_bytes(current: Layout, context: Context) -> int | None:
    """A device's own memory stays what it is; a share of the node's is as large as the number of devices allows."""
    if context.config.device_bytes is None and current.memory_mode == "shared":
        return None
    return current.memory.device_pages * current.memory.page_bytes


def _check_addresses(layout: Layout) -> None:
    """A node's pool that is there does not grow."""
    for pool in map(node_pool, layout.nodes):
        if layout.needed_pages(pool) > layout.pool_pages(pool):
            raise OperatorError(
                f"memory: pool {pool} would need {layout.needed_pages(pool)} pages and was started with "
                f"{layout.pool_pages(pool)}; start the deployment anew with {len(layout.seats)} workers"
            )


def route(current: Layout, target: Layout, context: Context) -> tuple[Layout, ...]:
    """Layouts to go through one after the other, ``target`` the last; usually it alone.

    Where a device's own memory does not hold the experts of both placements beside the KV cache of one sequence of
    full length, the phases of a migration become generations of their own: each neighbouring pair of them fits.

    Raises
    ------
    OperatorError
        No way was found; names the devices that lack memory, and how much.
    """
    if target.memory_mode == "shared" or _fits_at_once(current, target, context):
        return (target,)
    seats = current.seats + tuple(seat for seat in target.seats if seat not in current.seats)
    found = plan_migration(_migration_problem(current, target, seats, context))
    if isinstance(found, Infeasible):
        raise OperatorError(f"device-memory: no way from here to there; {found}")
    reserved = {**_reserved(current), **_reserved(target)}
    through = replace(target, seats=seats, reserved_experts=tuple(reserved[seat.device] for seat in seats))
    return (*(_between(through, held, context) for held in _held_between(current, found)), target)


def _reserved(layout: Layout) -> dict[str, int]:
    return dict(zip(layout.devices, layout.reserved_experts, strict=True))


def _fits_at_once(current: Layout, target: Layout, context: Context) -> bool:
    before = {seat.device: set(current.experts_of(rank)) for rank, seat in enumerate(current.seats)}
    return all(
        len(before.get(seat.device, set()) | set(target.experts_of(rank))) <= _expert_room(target, seat, context)
        for rank, seat in enumerate(target.seats)
    )


def _expert_room(layout: Layout, seat: Seat, context: Context) -> int:
    """Experts that a device holds beside the KV cache of one sequence of full length."""
    memory = layout.memory
    return (layout.device_pages(seat) - context.length_blocks * memory.kv_block_pages) // memory.expert_pages


def _migration_problem(current: Layout, target: Layout, seats: Sequence[Seat], context: Context) -> MigrationProblem:
    """Room and weights counted in experts, which all take equally many pages."""
    rooms = [_expert_room(target, seat, context) for seat in seats]
    devices = tuple(Device(s.device, s.kind.name, room, 1.0, 1.0, s.node) for s, room in zip(seats, rooms, strict=True))
    spec = ModelSpec(context.spec.layers, context.spec.experts, expert_bytes=1.0, flops_per_token=1.0)
    return MigrationProblem(Cluster(devices), spec, current.placement, target.placement)


def _held_between(current: Layout, way: Migration) -> list[dict[str, set[Key]]]:
    """What every device holds after each phase but the last."""
    held = {seat.device: set(current.experts_of(rank)) for rank, seat in enumerate(current.seats)}
    between = []
    for phase in way.phases[:-1]:
        held = _after(held, phase)
        between.append(held)
    return between


def _after(held: dict[str, set[Key]], phase: Phase) -> dict[str, set[Key]]:
    after = {device: set(keys) for device, keys in held.items()}
    for move in phase.moves:
        after.setdefault(move.target, set()).add((move.layer, move.expert))
    for free in phase.frees:
        after[free.device].remove((free.layer, free.expert))
    return after


def _between(through: Layout, held: dict[str, set[Key]], context: Context) -> Layout:
    """A layout in which all devices, old and new, serve what they hold in between; equal shares."""
    exchange = exchange_kind(context.config, through.seats)
    return replace(
        through,
        placement=_placement_of(through.seats, held, through.placement),
        exchange=exchange,
        exchange_pages=exchange_pages(exchange, len(through.seats), through.memory.page_bytes),
    )


def _placement_of(seats: Sequence[Seat], held: dict[str, set[Key]], like: Placement) -> Placement:
    slots = {
        (layer, expert, rank): slot
        for rank, seat in enumerate(seats)
        for layer in range(like.layers)
        for slot, (_, expert) in enumerate(sorted(key for key in held.get(seat.device, ()) if key[0] == layer))
    }
    layers = []
    for layer in range(like.layers):
        experts = []
        for expert in range(like.experts):
            ranks = [rank for rank in range(len(seats)) if (layer, expert, rank) in slots]
            experts.append(tuple(Replica(rank, slots[layer, expert, rank], 1 / len(ranks)) for rank in ranks))
        layers.append(tuple(experts))
    return Placement(tuple(seat.device for seat in seats), tuple(layers))


def _holders(placement: Placement) -> list[list[frozenset[int]]]:
    return [[frozenset(r.device for r in replicas) for replicas in layer] for layer in placement.replicas_LE]
