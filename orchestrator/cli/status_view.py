"""The status as tables. Pure: the same statuses and times give the same picture."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..status import DeploymentStatus, PoolStatus, WorkerStatus

_MIB = 1 << 20
_PURPOSES = ("experts", "trunk", "kv", "exchange", "table", "free")


def _mib(pages: int, page_bytes: int) -> str:
    return f"{pages * page_bytes / _MIB:,.1f}"


def _spread(counts: tuple[int, ...]) -> str:
    """``5``, or ``5-6`` where layers differ."""
    if not counts:
        return "0"
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"


def _pages_table(pools: tuple[PoolStatus, ...]) -> Table:
    table = Table(title="Pages by purpose (MiB)", title_justify="left")
    table.add_column("pool")
    table.add_column("node")
    for purpose in (*_PURPOSES, "all"):
        table.add_column(purpose, justify="right")
    for pool in pools:
        cells = [_mib(pool.by_purpose.get(p, 0), pool.page_bytes) for p in _PURPOSES]
        table.add_row(pool.name, pool.node[:8], *cells, _mib(pool.pages, pool.page_bytes))
    return table


class StatusView:
    """Turns statuses into tables; remembers the last one to show rates."""

    def __init__(self) -> None:
        self._last: tuple[float, dict[int, int]] | None = None

    def render(self, status: DeploymentStatus, now_s: float) -> RenderableType:
        """Tables for a terminal; token rates are since the previous call."""
        rates = self._rates(status, now_s)
        head = Text.assemble(
            (f"{status.name}", "bold"),
            f"  {status.model}  {status.endpoint}  generation {status.generation} {status.phase}"
            f"  exchange {status.exchange}  {status.dtype}  up {status.uptime_s:,.0f} s",
        )
        parts: list[RenderableType] = [head, self._workers_table(status, rates), _pages_table(status.pools)]
        if status.detail:
            parts.insert(1, Text(status.detail, style="red"))
        return Group(*parts)

    def _rates(self, status: DeploymentStatus, now_s: float) -> dict[int, float]:
        now = {w.rank: w.generated_tokens for w in status.workers}
        last, self._last = self._last, (now_s, now)
        if last is None or now_s <= last[0]:
            return {}
        return {r: max(0, n - last[1].get(r, n)) / (now_s - last[0]) for r, n in now.items()}

    def _workers_table(self, status: DeploymentStatus, rates: dict[int, float]) -> Table:
        title = f"Workers ({status.layers} MoE layers x {status.experts} experts)"
        table = Table(title=title, title_justify="left")
        for name in ("worker", "device", "node", "state"):
            table.add_column(name)
        for name in ("experts/layer", "routed", "running", "waiting", "KV blocks", "prompt tok", "gen tok", "tok/s"):
            table.add_column(name, justify="right")
        total = sum(w.routed_tokens for w in status.workers)
        for w in status.workers:
            table.add_row(*self._cells(w, total, rates.get(w.rank)))
        return table

    @staticmethod
    def _cells(w: WorkerStatus, routed_total: int, rate: float | None) -> tuple[str, ...]:
        routed = f"{w.routed_tokens / routed_total:.0%}" if routed_total else "-"
        return (
            str(w.rank),
            w.device,
            w.node[:8],
            w.state,
            _spread(w.experts_per_layer),
            routed,
            str(w.load.running),
            str(w.load.waiting),
            f"{w.load.kv_blocks_used:,}/{w.load.kv_blocks:,}",
            f"{w.prompt_tokens:,}",
            f"{w.generated_tokens:,}",
            "-" if rate is None else f"{rate:,.1f}",
        )
