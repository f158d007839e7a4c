"""Operations on the terminal: a live line while one runs, a line at its end, a table of the latest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..api import Deployment, patience_of
from ..status import OperationStatus, bar_of

_LOOK_S = 0.5
_STYLES = {"running": "yellow", "done": "green", "failed": "red", "canceled": "dim", "superseded": "dim"}


def watch(
    deployment: Deployment,
    status: OperationStatus,
    timeout_s: float | None = None,
    console: Console | None = None,
    now: Callable[[], float] = time.monotonic,
) -> OperationStatus:
    """Show an operation until it ends or ``timeout_s`` seconds have passed.

    On a terminal that is a live line, else one line for each phase, and for what keeps it there.
    """
    console = console or Console(stderr=True)
    end_s = now() + (math.inf if timeout_s is None else timeout_s)
    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), text, BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(status.text, total=None)
        told = ""
        while True:
            done, total = bar_of(status.bytes_done, status.bytes_total)
            bar.update(task, description=_now(status), completed=done, total=total)
            if not console.is_terminal and _now(status) != told:
                console.print(f"{_now(status)}{progress(status)}", highlight=False, markup=False, soft_wrap=True)
            told = _now(status)
            left_s = end_s - now()
            if status.state != "running" or left_s <= 0:
                return status
            status = deployment.operation(status.id, min(_LOOK_S, left_s), patience_of(left_s))


def _now(status: OperationStatus) -> str:
    said = f"{status.text}: {status.phase}" if status.phase else status.text
    return f"{said} ({status.reason})" if status.reason and status.state == "running" else said


def progress(status: OperationStatus) -> str:
    """Bytes moved so far of all, while it runs and moves any."""
    if not status.bytes_total or status.state != "running":
        return ""
    return f" ({status.bytes_done / 1e6:,.1f} of {status.bytes_total / 1e6:,.1f} MB)"


def outcome(status: OperationStatus) -> str:
    """What happened, how long it took or how far it is, and why it went wrong."""
    if status.state == "running":
        said = f"under way, {status.phase}" if status.phase else "under way"
    elif status.ended_s:
        said = f"{status.state} after {max(0.0, status.ended_s - status.started_s):.1f} s"
    else:
        said = status.state
    if status.state == "done" and status.committed_s:
        said += f", serving after {max(0.0, status.committed_s - status.started_s):.1f} s"
    moved = f", {status.bytes_done / 1e6:,.1f} MB moved" if status.state == "done" and status.bytes_done else ""
    reason = f": {status.reason}" if status.reason else ""
    return f"{status.text}: {said}{moved} (operation {status.id}){reason}"


def operations_table(operations: Sequence[OperationStatus]) -> Table:
    """The latest operations, newest last."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("id", "what", "state"):
        table.add_column(name, no_wrap=name != "what", overflow="fold")  # a drained node's id is 56 letters
    for name in ("began, s", "took, s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("phase or reason")
    for o in operations:
        took = f"{o.ended_s - o.started_s:.1f}" if o.ended_s else "-"
        state = Text(o.state, style=_STYLES[o.state])
        table.add_row(o.id, Text(o.text), state, f"{o.started_s:,.0f}", took, Text(o.reason or o.phase))
    return table
