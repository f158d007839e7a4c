"""Whether a layout fits the memory of its nodes. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..errors import OperatorError
from .core.layout import Layout, node_pool
from .hands import NodeInfo

_MIB = 1 << 20
_MOST_PAGES = 1 << 20  # an owner's books grow with the pool: tens of megabytes and milliseconds at this many
_UNKNOWN_BYTES = 1 << 36  # taken for a node of unknown memory
_EXCHANGES = 2  # of the generation that serves and of the one that is coming


def with_pools(layout: Layout, nodes: Iterable[NodeInfo]) -> Layout:
    """The layout, in which the pools of new nodes have what they need now, as if every expert came there, and twice as
    many pages as their node could ever hold.

    A page costs memory only once it is used; the pool's books, and what waits to be freed, have pages too.
    """
    started = dict(layout.started)
    for node in nodes:
        if node.id in layout.nodes and node.id not in started:
            ever = 2 * (node.available_bytes or _UNKNOWN_BYTES) // layout.memory.page_bytes
            needed = layout.needed_pages(node_pool(node.id))
            started[node.id] = max(needed, min(_MOST_PAGES, needed + ever))
    return replace(layout, started=tuple(started.items()))


def held_experts(layouts: Sequence[Layout], node: str) -> dict[str, set[tuple[int, int]]]:
    """Experts in each pool of a node that any of the layouts needs; a pool has one copy of an expert."""
    held: dict[str, set[tuple[int, int]]] = {}
    for layout in layouts:
        for rank, seat in enumerate(layout.seats):
            if seat.node == node:
                held.setdefault(layout.device_pool(rank), set()).update(layout.experts_of(rank))
    return held


def node_use(layout: Layout, node: str, before: Layout | None = None) -> dict[str, int]:
    """Pages that a layout uses on a node, by what for; with ``before``, just before it comes in that one's place."""
    held = held_experts([layout, before] if before else [layout], node)
    kv = [layout.kv_coming_from(before, pool) if before else layout.kv_in(pool) for pool in held]
    return {
        "experts": sum(map(len, held.values())) * layout.memory.expert_pages,
        "KV cache": sum(sum(blocks.values()) for blocks in kv) * layout.memory.kv_block_pages,
        "trunk": layout.memory.trunk_pages,
        "exchange": _EXCHANGES * layout.exchange_pages if node == layout.nodes[0] else 0,
    }


def check_nodes(layout: Layout, nodes: Iterable[NodeInfo], before: Layout | None = None) -> None:
    """Refuse a layout whose devices together want more than one of their nodes has.

    A node of unknown memory (0 bytes) is not checked, and what ``before`` takes there itself is not refused.

    Raises
    ------
    OperatorError
        Names the node, what is needed and what there is.
    """
    available = {node.id: node.available_bytes for node in nodes}
    for node in layout.nodes:
        uses = [node_use(layout, node), *([node_use(layout, node, before)] if before else [])]
        use = max(uses, key=lambda use: sum(use.values()))
        needed = sum(use.values()) * layout.memory.page_bytes
        taken = sum(node_use(before, node).values()) * layout.memory.page_bytes if before else 0
        if 0 < available.get(node, 0) < needed and needed > taken:
            parts = ", ".join(f"{what} {_mib(pages, layout)}" for what, pages in use.items())
            workers = sum(seat.node == node for seat in layout.seats)
            raise OperatorError(
                f"memory: {workers} workers need {needed / _MIB:.1f} MiB of node {node} ({parts}), "
                f"which has {available[node] / _MIB:.1f} MiB; "
                "use fewer workers, more nodes or a smaller --device-memory"
            )


def _mib(pages: int, layout: Layout) -> str:
    return f"{pages * layout.memory.page_bytes / _MIB:.1f}"
