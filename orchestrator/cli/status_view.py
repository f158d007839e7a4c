"""The status as tables that fit 80 columns. Pure: the same statuses and times give the same picture."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core.layout import pool_title
from ..status import DeploymentStatus, OperationStatus, PoolStatus, WorkerStatus
from .operation_view import outcome, progress

_MIB = 1 << 20
_PURPOSES = ("experts", "trunk", "kv", "exchange")  # the rest of a pool is addresses, which cost nothing
_WORKER_COLUMNS = ("experts", "routed", "run+wait", "KV used", "blocks", "prompt", "output", "tok/s")


class StatusView:
    """Turns statuses into tables; remembers the last one to show rates."""

    def __init__(self) -> None:
        self._last: tuple[float, dict[int, int]] | None = None

    def render(self, status: DeploymentStatus, now_s: float) -> RenderableType:
        """Tables for a terminal; token rates are since the previous call."""
        rates = self._rates(status, now_s)
        style = "red" if status.phase == "failed" else "green"
        head = Text.assemble(
            (status.name, "bold"), f"  generation {status.generation} ", (status.phase, style), f"  {status.endpoint}\n"
        )
        head.append(
            f"{status.model}  {status.dtype}  {status.layers} MoE layers x {status.experts} experts"
            f"  exchange {status.exchange}  up {status.uptime_s:,.0f} s"
        )
        if status.standbys:
            head.append(f"  standbys {status.standbys}")
        if status.emulated_step_ms:
            head.append(f"\nstep times are emulated: at least {status.emulated_step_ms:g} ms", style="yellow")
        if status.cordoned:
            head.append(f"\ndrained nodes, which get no workers: {', '.join(node[:8] for node in status.cordoned)}")
        if status.detail:
            head.append(f"\n{status.detail}", style="red")
        _append_operation(head, status.operations)
        return Group(head, _workers_table(status, rates), _pages_table(status.pools))

    def _rates(self, status: DeploymentStatus, now_s: float) -> dict[int, float]:
        now = {w.rank: w.generated_tokens for w in status.workers}
        last, self._last = self._last, (now_s, now)
        if last is None or now_s <= last[0]:
            return {}
        return {rank: max(0, n - last[1].get(rank, n)) / (now_s - last[0]) for rank, n in now.items()}


def _append_operation(head: Text, operations: tuple[OperationStatus, ...]) -> None:
    """The operation under way, or the last one if it went wrong."""
    if operations and operations[-1].state in ("running", "failed"):
        last = operations[-1]
        head.append(f"\n{outcome(last)}{progress(last)}", style="red" if last.state == "failed" else "yellow")


def _table(title: str) -> Table:
    return Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))


def _workers_table(status: DeploymentStatus, rates: dict[int, float]) -> Table:
    table = _table("Workers (experts: physical experts per MoE layer; tokens since start)")
    table.add_column("device", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in _WORKER_COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    several = len({w.node for w in status.workers}) > 1
    total = sum(w.routed_tokens for w in status.workers)
    for w in status.workers:
        table.add_row(*_worker_cells(w, total, rates.get(w.rank), several))
    return table


def _worker_cells(w: WorkerStatus, routed_total: int, rate: float | None, several: bool) -> tuple[str, ...]:
    return (
        f"{w.device}@{w.node[:4]}" if several else w.device,
        w.state,
        _spread(w.experts_per_layer),
        f"{w.routed_tokens / routed_total:.0%}" if routed_total else "-",
        f"{w.load.running}+{w.load.waiting}",
        f"{w.load.kv_blocks_used / max(1, w.load.kv_blocks):.0%}",
        _count(w.load.kv_blocks),
        _count(w.prompt_tokens),
        _count(w.generated_tokens),
        "-" if rate is None else f"{rate:,.0f}",
    )


def _pages_table(pools: tuple[PoolStatus, ...]) -> Table:
    table = _table("Pages by purpose (MiB)")
    table.add_column("pool", no_wrap=True)
    for purpose in _PURPOSES:
        table.add_column(purpose, justify="right", no_wrap=True)
    for pool in pools:
        pages = [pool.by_purpose.get(purpose, 0) for purpose in _PURPOSES]
        table.add_row(pool_title(pool.name), *(f"{n * pool.page_bytes / _MIB:,.1f}" for n in pages))
    return table


def _count(n: int) -> str:
    """``999``, ``12.3k``, ``4.6M``: at most six characters up to 999 billion."""
    if n < 10**4:
        return str(n)
    shown, unit = n / 1e3, "k"
    for larger in "MG":
        if shown >= 999.95:  # else it would be rounded to 1,000.0
            shown, unit = shown / 1e3, larger
    return f"{shown:,.1f}{unit}"


def _spread(counts: tuple[int, ...]) -> str:
    """``5``, or ``5-6`` where layers differ."""
    if not counts:
        return "0"
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"
