"""``concertina train``: options to a configuration, and a run to a progress bar and a table."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console

from ...workers.training import ModelShape, Recipe, RunOptions, TrainConfig, TrainingStopped, train
from ...workers.training.pace import steps_for
from .train_view import Bar, summary_table

_MODEL, _RECIPE = ModelShape(), Recipe()
_HELP = {
    "layers": "Decoder layers.",
    "hidden": "Width of the residual stream.",
    "heads": "Attention heads.",
    "kv_heads": "Key/value heads.",
    "experts": "Experts of every layer.",
    "top_k": "Experts of every token.",
    "expert_hidden": "Inner width of an expert.",
    "max_positions": "Longest context that the checkpoint declares.",
    "batch_tokens": "Bytes per step.",
    "seq_len": "Longest training sequence.",
    "short_len": "Length of the first sequences.",
    "growth": "Part of the steps over which sequences double to --seq-len.",
    "lr": "Peak learning rate of the layers.",
    "vocabulary_lr": "Peak learning rate of embedding and output matrix.",
    "warmup": "Part of the steps in which the learning rate rises.",
    "weight_decay": "AdamW's decay.",
    "beta1": "AdamW's first-moment decay.",
    "beta2": "AdamW's second-moment decay.",
    "grad_clip": "Largest global gradient norm.",
    "balance_loss": "Weight of the load-balancing loss.",
    "z_loss": "Weight of the router z-loss.",
}


def _number_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for every numeric field of the model and the recipe, named like the field."""
    for name, text in reversed(_HELP.items()):
        default = getattr(_MODEL if hasattr(_MODEL, name) else _RECIPE, name)
        option = click.option(f"--{name.replace('_', '-')}", default=default, show_default=True, help=text)
        command = option(command)
    return command


@click.command("train", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Directory of text files.  [default: this Python's standard library]",
)
@click.option("--steps", type=click.IntRange(min=1), help=f"Optimizer steps.  [default: {_RECIPE.steps}]")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Choose the steps by a measurement.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights and data order.")
@click.option("--schedule", type=click.Choice(["cosine", "linear", "wsd"]), default=_RECIPE.schedule, show_default=True)
@click.option("--norm-topk/--no-norm-topk", default=_MODEL.norm_topk, show_default=True, help="norm_topk_prob.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use.  [default: one per core]")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with a run in OUT, or discard it.")
@click.option("--save-every", type=click.IntRange(min=1), default=200, show_default=True, help="Steps between states.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@_number_options
def command(
    out: Path, data: Path | None, steps: int | None, minutes: float | None, as_json: bool, **flags: Any
) -> None:
    """Train a small byte-level MoE model and write it to OUT as a Hugging Face checkpoint."""
    if steps is not None and minutes is not None:
        raise click.UsageError("--steps and --minutes exclude each other")
    with _stop_on_signals() as stop:
        options = RunOptions(out, data, flags["resume"], flags["threads"], flags["save_every"], stop)
        config = _config(flags, steps)
        if minutes is not None:
            config = _with_steps(config, steps_for(minutes, config, options))
        try:
            with Bar(Console(stderr=True)) as bar:
                summary = train(config, options, bar)
        except TrainingStopped as e:
            click.echo(f"concertina: {e}", err=True)
            sys.exit(130)
    if as_json:
        click.echo(json.dumps(summary.to_dict(), indent=2))
    else:
        Console().print(summary_table(summary))


def _config(flags: dict[str, Any], steps: int | None) -> TrainConfig:
    model = ModelShape(**{f.name: flags[f.name] for f in dataclasses.fields(ModelShape) if f.name in flags})
    recipe = Recipe(**{f.name: flags[f.name] for f in dataclasses.fields(Recipe) if f.name in flags})
    config = TrainConfig(model, recipe, flags["seed"])
    return config if steps is None else _with_steps(config, steps)


def _with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, steps=steps))


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """The first SIGINT or SIGTERM asks for a stop after the step, the second ends the program at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
