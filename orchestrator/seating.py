"""Which device sits on which node: by cores, by what a cluster file says, never on a node that was drained. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from ..errors import OperatorError
from .core.inventory import Entry
from .core.layout import Seat
from .hands import NodeInfo

if TYPE_CHECKING:
    from .planning import Context

_LEAST_NODE_PREFIX = 4  # characters of a node's id that name it, as the status shows


def next_node(nodes: Sequence[NodeInfo], taken: Counter[str]) -> str:
    """Where one more worker has most cores; nodes with more memory first."""
    if not nodes:
        raise OperatorError("cluster: no node is alive")
    return max(nodes, key=lambda n: (n.cpus / (taken[n.id] + 1), n.available_bytes)).id


def nodes_called(name: str, hosts: Mapping[str, str]) -> list[str]:
    """Those of the nodes, given with their addresses (empty: unknown), that a name may stand for."""
    if not name:
        return []
    long_enough = len(name) >= _LEAST_NODE_PREFIX
    return [n for n, host in hosts.items() if name in (n, host) or (long_enough and n.startswith(name))]


def node_for(entry: Entry, nodes: Sequence[NodeInfo], taken: Counter[str]) -> str:
    """The node of one more device: the one that it must be on, else where most cores are left.

    Raises
    ------
    OperatorError
        Its node's name may mean several, or no node is alive.
    """
    if not entry.node:
        return next_node(nodes, taken)
    found = nodes_called(entry.node, {node.id: node.host for node in nodes})
    if len(found) != 1:
        there = ", ".join(f"{node.id} ({node.host})" for node in nodes)
        raise OperatorError(f"cluster: device {entry.device}: its node {entry.node!r} may be one of several: {there}")
    return found[0]


def further_seats(
    seats: Sequence[Seat], workers: int, context: Context, taken: Collection[str] = ()
) -> tuple[Seat, ...]:
    """New seats beside the old ones for so many workers in all, in the inventory's order, on no cordoned node.

    ``taken`` are names that may not be used either. A device whose node is not there is passed over.

    Raises
    ------
    OperatorError
        There are not so many devices whose nodes are alive, or every node is cordoned.
    """
    shut = {node.id: node.host for node in context.nodes if node.id in context.cordoned}
    nodes = [node for node in context.nodes if node.id not in shut]
    if not nodes and shut:
        raise OperatorError(
            f"workers: {workers}; every node is drained ({', '.join(sorted(shut))}); "
            "concertina undrain lets one take workers again"
        )
    inventory = context.config.inventory
    free = inventory.free({*taken, *(seat.device for seat in seats)})
    hosts = {node.id: node.host for node in nodes}
    entries = list(islice((e for e in free if not e.node or nodes_called(e.node, hosts)), workers - len(seats)))
    if len(seats) + len(entries) < workers:
        staying = {seat.device for seat in seats}
        usable = [e.device for e in inventory.entries if not e.node or nodes_called(e.node, hosts)]
        leaving = [device for device in usable if device in taken and device not in staying]
        passed_over = _passed_over(inventory.entries, hosts, shut)
        if leaving and seats:
            passed_over += f"; that would have to leave first: {', '.join(leaving)} (--workers {len(seats)} before)"
        raise OperatorError(f"workers: {workers}; the cluster file lists {len(inventory.entries)} devices{passed_over}")
    held = Counter(seat.node for seat in seats)
    added = []
    for entry in entries:
        node = node_for(entry, nodes, held)
        held[node] += 1
        added.append(Seat(entry.device, node, entry.kind))
    return tuple(added)


def _passed_over(entries: Sequence[Entry], hosts: Mapping[str, str], shut: Mapping[str, str]) -> str:
    """Which of a cluster file's devices cannot be used now, and why."""
    bound = [
        (entry, nodes_called(entry.node, shut), nodes_called(entry.node, hosts)) for entry in entries if entry.node
    ]
    drained = [entry.device for entry, drained, _ in bound if drained]
    gone = [f"{entry.device} ({entry.node})" for entry, drained, alive in bound if not drained and not alive]
    reasons = (("on drained nodes", drained), ("on nodes that are not alive", gone))
    return "".join(f"; {where}: {', '.join(devices)}" for where, devices in reasons if devices)


def first_seats(context: Context) -> tuple[Seat, ...]:
    """Those of a deployment that starts; raises as `further_seats` does, and where one of the first has no node."""
    config = context.config
    if not config.fleet:
        return seat_workers(context.nodes, config.workers)
    hosts = {node.id: node.host for node in context.nodes}
    for entry in config.inventory.entries[: config.workers]:  # a slip of the pen, more likely than a node that is late
        if entry.node and not nodes_called(entry.node, hosts):
            there = ", ".join(f"{node} ({host})" for node, host in hosts.items()) or "none"
            raise OperatorError(f"cluster: device {entry.device}: its node {entry.node!r} is not alive; alive: {there}")
    return further_seats((), config.workers, context)


def seat_workers(nodes: Sequence[NodeInfo], workers: int) -> tuple[Seat, ...]:
    """Spread workers over nodes in proportion to cores, the next one where most cores per worker are left."""
    taken: Counter[str] = Counter()
    for _ in range(workers):
        taken[next_node(nodes, taken)] += 1
    seats = [node.id for node in nodes for _ in range(taken[node.id])]
    return tuple(Seat(f"cpu-{rank}", node) for rank, node in enumerate(seats))
