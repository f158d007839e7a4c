"""``concertina train``: options to a configuration. Imports torch only once they are known to be good."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ...workers.training.config import ModelShape, Recipe, TrainConfig

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
    config = _config(flags, steps)
    _wait_briefly()
    from .train_run import Request, run

    run(config, Request(out, data, minutes, flags["resume"], flags["threads"], flags["save_every"], as_json))


def _wait_briefly() -> None:
    """Let OpenMP's threads spin for some 50 us only before they sleep; must come before torch is imported.

    Steps are a few thousand short parallel regions. With GNU's default a thread that waits for another one burns
    its core for milliseconds; on a busy machine that made steps 8 times slower, while on an idle one it gains 10 %.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _config(flags: dict[str, Any], steps: int | None) -> TrainConfig:
    model = ModelShape(**{f.name: flags[f.name] for f in dataclasses.fields(ModelShape) if f.name in flags})
    recipe = Recipe(**{f.name: flags[f.name] for f in dataclasses.fields(Recipe) if f.name in flags})
    config = TrainConfig(model, recipe, flags["seed"])
    return config if steps is None else config.with_steps(steps)
