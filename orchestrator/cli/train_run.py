"""Runs what ``concertina train`` was asked for: signals to a saved state, the end to a table or JSON."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click
from rich.console import Console

from ...workers.training.config import TrainConfig
from ...workers.training.loop import RunOptions, train
from ...workers.training.pace import steps_for
from ...workers.training.report import Summary, TrainingStopped
from .train_view import Bar, summary_table


@dataclass(frozen=True)
class Request:
    """The command's options beside the configuration."""

    out: Path
    data: Path | None
    minutes: float | None
    resume: bool
    threads: int | None
    save_every: int
    as_json: bool


def run(config: TrainConfig, request: Request) -> None:
    """Train, and print the summary; a stop by signal ends the process with status 130."""
    try:
        with _stop_on_signals() as stop:
            summary = _train(config, request, stop)
    except TrainingStopped as e:
        click.echo(f"concertina: {e}", err=True)
        sys.exit(130)
    if request.as_json:
        click.echo(json.dumps(summary.to_dict(), indent=2))
    else:
        Console().print(summary_table(summary))


def _train(config: TrainConfig, request: Request, stop: Callable[[], bool]) -> Summary:
    options = RunOptions(request.out, request.data, request.resume, request.threads, request.save_every, stop)
    if request.minutes is not None:
        config = config.with_steps(steps_for(request.minutes, config, options))
    with Bar(Console(stderr=True)) as bar:
        summary = train(config, options, bar)
    if not bar.started:
        click.echo(f"{request.out}: trained before; --no-resume discards it and starts over", err=True)
    return summary


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
