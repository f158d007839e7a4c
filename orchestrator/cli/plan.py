"""``concertina plan``: place experts offline, compare and explain plans, size a fleet."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ...planners.advise import Horizon
from ...planners.explain import explain
from ...planners.fleet_solve import plan_fleet
from ...planners.migrate import plan_migration
from ...planners.migration import MigrationProblem
from ...planners.milp import MilpOptions
from ...planners.problem import Objective, Options, PlacementProblem
from ...planners.solution import Infeasible, StoppingRule
from ..config import parse_bytes
from ..fleetfile import fleet_to_dict, read_fleet
from ..plandoc import PlanDocument, read_plan, write_json, write_plan
from ..planfiles import read_cluster, read_loads, read_model, read_placement
from ..planplot import plot_plan
from ..planrun import PLAN_METHODS, PlanChoices, make_plan, spread_slots
from . import plan_view

_FILE = click.Path(dir_okay=False, path_type=Path)
_POSITIVE = click.FloatRange(min=0, min_open=True)
_PART = click.FloatRange(0, 1, min_open=True)
_TAIL = click.FloatRange(0, 1, max_open=True)
_SPARE_HELP = "Replicas per layer beyond one of each expert.  [default: what memory holds]"
_BATCH_HELP = "Workers split replicated experts' tokens afresh for every batch."


@dataclass(frozen=True)
class Given:
    """The options of ``concertina plan``."""

    model: Path
    cluster: Path
    loads: Path
    current: Path | None
    output: Path | None
    plot: Path | None
    method: str
    time_limit: float
    spare_slots: int | None
    tokens_per_step: float | None
    balance: float
    horizon: float
    reserve: str
    min_nodes: int
    tail: float
    per_batch: bool
    seed: int


@click.group("plan", invoke_without_command=True)
@click.option("--model", type=click.Path(path_type=Path), help="Hugging Face config.json, or a model file.")
@click.option("--cluster", type=_FILE, help="Devices and links.")
@click.option("--loads", type=_FILE, help="Tokens per layer and expert, JSON or CSV.")
@click.option("--current", type=_FILE, help="The placement of now: re-plan, and order the migration.")
@click.option("-o", "--output", type=_FILE, help="Write the plan here; it is a placement file too.")
@click.option("--plot", type=_FILE, help="Write a heat map of the loads here, as PNG and SVG.")
@click.option("--method", type=click.Choice(PLAN_METHODS), default="auto", show_default=True)
@click.option("--time-limit", type=_POSITIVE, default=10.0, show_default=True, help="Seconds.")
@click.option("--spare-slots", type=click.IntRange(min=0), help=_SPARE_HELP)
@click.option("--tokens-per-step", type=_POSITIVE, help="Rescale the loads to a step of so many tokens.")
@click.option("--balance", type=_PART, default=0.98, show_default=True, help="What a re-plan must reach.")
@click.option("--horizon", type=_POSITIVE, default=600.0, show_default=True, help="Seconds a new placement serves.")
@click.option("--reserve", default="0", show_default=True, help="Memory kept free on each device, such as 20GiB.")
@click.option(
    "--min-nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Nodes that hold an expert."
)
@click.option("--tail", type=_TAIL, default=0.0, show_default=True, help="Minimise the worst 1 - TAIL of scenarios.")
@click.option("--per-batch", is_flag=True, help=_BATCH_HELP)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.pass_context
def command(ctx: click.Context, /, **given: Any) -> None:
    """Plan where experts live, offline.

    \b
    concertina plan --model config.json --cluster cluster.yaml --loads loads.json -o plan.json
    concertina plan ... --current plan.json -o next.json --plot next
    """
    if ctx.invoked_subcommand is not None:
        return
    missing = [f"--{name}" for name in ("model", "cluster", "loads") if given[name] is None]
    if missing:
        raise click.UsageError(f"Missing option {', '.join(missing)} (or a command: compare, explain, fleet).")
    _plan(Given(**given))


def _plan(given: Given) -> None:
    model = read_model(given.model)
    devices = read_cluster(given.cluster)
    slots = None
    if given.spare_slots is not None:
        slots = spread_slots(model.experts, given.spare_slots, devices.cluster)
    problem = PlacementProblem(
        devices.cluster,
        model,
        read_loads(given.loads, model, given.tokens_per_step),
        slots=slots,
        current=read_placement(given.current) if given.current else None,
        options=Options(memory_reserve_bytes=parse_bytes(given.reserve), min_nodes=given.min_nodes),
        objective=Objective(tail=given.tail, split="per_batch" if given.per_batch else "fixed"),
    )
    choices = PlanChoices(
        given.method,
        given.balance,
        StoppingRule(given.time_limit, now=time.monotonic),
        given.seed,
        Horizon(given.horizon),
    )
    with plan_view.progress_on(Console(stderr=True)) as report:
        plan = make_plan(problem, devices.alive, choices, report)
    Console().print(plan_view.summary(plan))
    if given.output:
        write_plan(given.output, plan)
        click.echo(f"plan: {given.output}")
    if given.plot:
        png, svg = plot_plan(given.plot, plan)
        click.echo(f"plot: {png}, {svg}")


@command.command("compare")
@click.argument("first", type=_FILE)
@click.argument("second", type=_FILE)
def compare(first: Path, second: Path) -> None:
    """Show two plans side by side, each judged by its own loads and by FIRST's, and what lies between them."""
    a, b = read_plan(first), read_plan(second)
    columns = [(first.name, a), (second.name, b)]
    same_shape = (a.problem.layers, a.problem.experts) == (b.problem.layers, b.problem.experts)
    fits = same_shape and set(b.placement.devices) <= set(a.problem.cluster.names)
    if fits and not _same_loads(a, b):
        columns.append((f"{second.name} under {first.name}'s loads", replace(b, problem=a.problem)))
    console = Console()
    console.print(plan_view.comparison(columns))
    if same_shape:
        console.print(f"\n{_between(a, b)}")


def _same_loads(a: PlanDocument, b: PlanDocument) -> bool:
    one, two = a.problem.loads.tokens_SLE, b.problem.loads.tokens_SLE
    return one.shape == two.shape and bool((one == two).all())


def _between(a: PlanDocument, b: PlanDocument) -> str:
    """What has to be moved to get from one plan to the other, on the second's devices."""
    move = MigrationProblem(b.problem.cluster, b.problem.model, a.placement, b.placement)
    migration = plan_migration(move)
    if isinstance(migration, Infeasible):
        return f"From the first to the second: {migration}"
    return (
        f"From the first to the second: {len(migration.moves)} copies, {plan_view.size(migration.moved_bytes)} "
        f"in {len(migration.phases)} phases, about {plan_view.seconds(migration.seconds)}"
    )


@command.command("explain")
@click.argument("plan", type=_FILE)
@click.option("--most", type=click.IntRange(min=1), default=12, show_default=True, help="Layers to show.")
def explain_plan(plan: Path, most: int) -> None:
    """Show which device limits which layer, and what would relieve it."""
    document = read_plan(plan)
    Console().print(plan_view.limits(explain(document.problem, document.placement), most))


@command.command("fleet")
@click.argument("file", type=_FILE)
@click.option("-o", "--output", type=_FILE, help="Write the plan here, as JSON.")
@click.option("--time-limit", type=_POSITIVE, default=60.0, show_default=True, help="Seconds.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.pass_context
def fleet(ctx: click.Context, file: Path, output: Path | None, time_limit: float, seed: int) -> None:
    """Choose how many devices of each kind to run, at least cost, over the periods ahead."""
    problem = read_fleet(file)
    plan = plan_fleet(problem, MilpOptions(time_limit, seed=seed))
    Console().print(plan_view.fleet(problem, plan))
    if output:
        write_json(output, fleet_to_dict(problem, plan))
    if not plan.serving_KT:
        ctx.exit(2)
