"""How plans are shown on a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...planners.advise import Advice
from ...planners.explain import LayerLimit
from ...planners.fleet import FleetPlan, FleetProblem
from ...planners.migration import Migration
from ...planners.solution import Progress as PlanProgress
from ..plandoc import PlanDocument


@contextmanager
def progress_on(console: Console) -> Iterator[Callable[[PlanProgress], None]]:
    """A bar of layers with cost and gap, on a terminal; nothing elsewhere."""
    columns = (
        TextColumn("planning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers, gap {task.fields[gap]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("plan", total=None, gap="?")

        def report(now: PlanProgress) -> None:
            gap = 1 - now.bound / now.cost if now.cost > 0 else 0.0
            bar.update(task, completed=now.layers_done, total=now.layers, gap=f"{100 * gap:.2f} %")

        yield report


def size(count: float) -> str:
    """Bytes for people: 3 significant digits, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # else it would be rounded to 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def seconds(value: float) -> str:
    """A time for people."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def plain_table(*columns: str, numbers: Sequence[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i in numbers else "left", overflow="fold")
    return table


def summary(plan: PlanDocument) -> RenderableType:
    """What was planned, what it costs, how balanced it is, and what moving there takes."""
    cost, problem = plan.cost, plan.problem
    table = plain_table("", "")
    table.show_header = False
    table.add_row("problem", f"{problem.layers} layers x {problem.experts} experts on {problem.devices} devices")
    table.add_row("method", f"{plan.method}: {plan.reason}")
    step = float(cost.step_L.sum() + cost.node_L.sum() + cost.cluster_L.sum())
    wires = f"links {seconds(float(cost.node_L.sum()))} in nodes + {seconds(float(cost.cluster_L.sum()))} between"
    table.add_row("step", f"{seconds(step)}: slowest devices {seconds(float(cost.step_L.sum()))}, {wires}")
    balance_L = cost.device_LD.mean(axis=1) / np.maximum(cost.device_LD.max(axis=1), 1e-300)
    worst = int(balance_L.argmin())
    table.add_row("balance", f"mean {balance_L.mean():.3f}, worst {balance_L[worst]:.3f} (layer {worst})")
    table.add_row("replicas", _replicas(plan))
    if plan.migration is not None:
        table.add_row("migration", _migration(plan.migration))
    if plan.advice is not None:
        table.add_row("advice", _advice(plan.advice))
    if plan.note:
        table.add_row("note", f"[yellow]{plan.note}[/]")
    return table


def _replicas(plan: PlanDocument) -> str:
    counts = [len(r) for experts in plan.placement.replicas_LE for r in experts]
    doubled = sum(c > 1 for c in counts)
    return f"{sum(counts)} for {len(counts)} experts; {doubled} have more than one, at most {max(counts)}"


def _migration(migration: Migration) -> str:
    text = f"{len(migration.moves)} copies, {size(migration.moved_bytes)} in {len(migration.phases)} phases, "
    text += f"about {seconds(migration.seconds)}"
    if migration.checkpoint_bytes:
        text += f"; {size(migration.checkpoint_bytes)} from the checkpoint"
    if migration.detour_bytes:
        text += f"; {size(migration.detour_bytes)} by detours, as memory is tight"
    return text


def _advice(advice: Advice) -> str:
    colour = "green" if advice.action == "migrate" else "cyan"
    return f"[bold {colour}]{advice.action}[/]: {advice.reason}"


def comparison(plans: Sequence[tuple[str, PlanDocument]]) -> RenderableType:
    """Plans side by side: cost by term, balance, replicas."""
    table = plain_table("", *(name for name, _ in plans), numbers=range(1, len(plans) + 1))
    costs = [p.cost for _, p in plans]
    rows = [
        ("method", [p.method for _, p in plans]),
        ("step", [seconds(c.total - c.moves) for c in costs]),
        ("  slowest devices", [seconds(float(c.step_L.sum())) for c in costs]),
        ("  links in nodes", [seconds(float(c.node_L.sum())) for c in costs]),
        ("  links between nodes", [seconds(float(c.cluster_L.sum())) for c in costs]),
    ]
    balance = [c.device_LD.mean(axis=1) / np.maximum(c.device_LD.max(axis=1), 1e-300) for c in costs]
    rows.append(("balance, mean", [f"{b.mean():.3f}" for b in balance]))
    rows.append(("balance, worst layer", [f"{b.min():.3f}" for b in balance]))
    rows.append(("replicas", [str(sum(len(r) for row in p.placement.replicas_LE for r in row)) for _, p in plans]))
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def limits(found: Sequence[LayerLimit], most: int) -> RenderableType:
    """The layers that lose most time to one device, and which devices limit how many layers."""
    table = plain_table(
        "layer", "device", "time", "x mean", "x best", "busiest experts", "relief", numbers=(0, 2, 3, 4)
    )
    worst = sorted(found, key=lambda x: (x.bound_s - x.time_s, x.layer))[:most]
    for x in sorted(worst, key=lambda x: x.layer):
        hottest = ", ".join(f"{e} ({100 * part:.0f}%)" for e, part in x.hottest)
        better = f" -> {seconds(x.relieved_s)}" if x.relieved_s < x.time_s else ""
        row = (str(x.layer), x.device, seconds(x.time_s), f"{x.time_s / x.mean_s:.2f}", f"{x.time_s / x.bound_s:.2f}")
        table.add_row(*row, hottest, x.relief + better)
    count = Counter(x.device for x in found).most_common(5)
    total, best = sum(x.time_s for x in found), sum(x.relieved_s for x in found)
    lines = [f"Limiting most layers: {', '.join(f'{d} ({n})' for d, n in count)}"]
    lines.append(f"All layers together {seconds(total)}; with every relief {seconds(best)}")
    return Group(table, "", *lines)


def fleet(problem: FleetProblem, plan: FleetPlan) -> RenderableType:
    """Counts per period, what they cost, and why."""
    if plan.shortages:
        return Group("[red]No fleet meets the targets:[/]", *(f"  {s}" for s in plan.shortages))
    table = plain_table("kind", *(f"t{t}" for t in range(problem.periods)), numbers=range(1, problem.periods + 1))
    for k, kind in enumerate(problem.kinds):
        table.add_row(kind.name, *(_count(plan, k, t) for t in range(problem.periods)))
    parts: list[RenderableType] = [table]
    if plan.cost is not None:
        c = plan.cost
        terms = f"running {c.running:.4g}, starting {c.starting:.4g}, stopping {c.stopping:.4g}"
        terms += f", shortfall {c.shortfall:.4g}" if problem.shortfall_price else ""
        parts += ["", f"Cost {c.total:.4g} ({terms}); {plan.status}, no plan costs less than {plan.bound or 0:.4g}", ""]
    for r in plan.reasons:
        periods = f"t{r.first}" if r.first == r.last else f"t{r.first}-t{r.last}"
        parts.append(f"{r.kind} {periods}: {r.count}: {r.text}")
    return Group(*parts)


def _count(plan: FleetPlan, k: int, t: int) -> str:
    """Serving, and what is ordered or given back then."""
    ordered, returned = plan.started_KT[k][t], plan.stopped_KT[k][t]
    return f"{plan.serving_KT[k][t]}" + (f" +{ordered}" if ordered else "") + (f" -{returned}" if returned else "")
