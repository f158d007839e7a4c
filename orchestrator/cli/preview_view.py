"""What a change would take, as tables that fit 80 columns."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from ..core.layout import pool_title
from ..preview import Preview

_MIB = 1 << 20


def render(preview: Preview) -> RenderableType:
    """Tables for a terminal."""
    instead = f"instead of {preview.supersedes}, which is under way; behind it once it is committed"
    instead = instead if preview.supersedes else ""
    if not preview.generations:
        return f"{preview.workers_before} workers already: {instead or 'nothing to do'}"
    way = "" if preview.generations < 2 else f", in {preview.generations} generations as memory is tight"
    head = (
        f"{preview.workers_before} -> {preview.workers_after} workers, exchange {preview.exchange}{way}\n"
        f"{preview.moved_bytes / _MIB:,.1f} MiB of weights to move, about {preview.seconds:,.1f} s; nothing was done"
        + (f"\n{instead}" if instead else "")
    )
    return Group(head, _devices_table(preview), _pools_table(preview))


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True, justify="left" if name in ("device", "", "pool", "node") else "right")
    return table


def _devices_table(preview: Preview) -> Table:
    table = _table("device", "node", "", "experts", "KV blocks", "to move, MiB")
    for d in preview.devices:
        table.add_row(
            d.device,
            d.node[:8],
            d.change,
            f"{d.experts_before} -> {d.experts_after}",
            f"{d.kv_blocks_before} -> {d.kv_blocks_after}",
            f"{d.moved_bytes / _MIB:,.1f}",
        )
    return table


def _pools_table(preview: Preview) -> Table:
    table = _table("pool", "node", "most pages", "to load, MiB")
    for p in preview.pools:
        table.add_row(pool_title(p.pool), p.node[:8], str(p.peak_pages), f"{p.loaded_bytes / _MIB:,.1f}")
    return table
