"""A training run on the terminal: a progress bar while it runs, a table at its end."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Eta
from rich.table import Table

from ...workers.training.report import RunStart, Summary
from ...workers.training.step import StepResult

_SMOOTHING = 0.95
_LINES = 10
"""Where nobody watches a live bar, so many lines report the run."""


class Bar:
    """A progress bar with loss, bytes per second and time left; a few plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), Eta(), console=console)
        self._run: RunStart | None = None
        self._task: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._bits = 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    @property
    def started(self) -> bool:
        """Whether the run had anything to do."""
        return self._run is not None

    def start(self, run: RunStart) -> None:
        self._run = run
        self._console.print(
            f"{run.parameters / 1e6:.1f} M parameters, {run.active_parameters / 1e6:.1f} M per token; "
            f"{run.train_bytes / 1e6:.1f} MB of text from {run.source}, {run.held_out_bytes / 1e6:.2f} MB held out"
        )
        if run.first_step:
            self._console.print(f"resuming after step {run.first_step} of {run.steps}")
        self._progress.start()
        self._task = self._progress.add_task("training", total=run.steps, completed=run.first_step, note="")

    def step(self, number: int, result: StepResult) -> None:
        assert self._run is not None
        assert self._task is not None
        first = number == self._run.first_step + 1
        self._bits = result.bits_per_byte if first else self._smooth(result.bits_per_byte)
        speed = self._progress.tasks[self._task].speed or 0.0
        note = f"{self._bits:.3f} bits/byte  {speed * self._run.batch_tokens:,.0f} tokens/s"
        self._progress.update(self._task, completed=number, note=note)
        if not self._console.is_terminal and number % max(1, self._run.steps // _LINES) == 0:
            self._console.print(f"step {number}/{self._run.steps}: {note}")

    def _smooth(self, bits: float) -> float:
        return _SMOOTHING * self._bits + (1 - _SMOOTHING) * bits

    def evaluating(self, done: int, total: int) -> None:
        if self._evaluation is None:
            self._evaluation = self._progress.add_task("held-out text", total=total, note="")
        self._progress.update(self._evaluation, completed=done)


def summary_table(summary: Summary) -> Table:
    """The run's figures, one a row."""
    table = Table(title="Training", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in _rows(summary):
        table.add_row(name, value)
    return table


def _rows(s: Summary) -> list[tuple[str, str]]:
    held_out = f"{s.held_out_files} files, {s.held_out_bytes / 1e3:,.0f} kB, chosen by hash of content"
    session = "" if s.session_steps == s.steps else f" (last session: {s.session_steps:,} steps)"
    return [
        ("parameters", f"{s.parameters / 1e6:.2f} M, {s.active_parameters / 1e6:.2f} M per token"),
        ("steps", f"{s.steps:,}"),
        ("tokens (bytes)", f"{s.tokens:,}"),
        ("time in steps", f"{s.wall_s:,.0f} s wall, {s.cpu_s:,.0f} s CPU{session}"),
        ("tokens/s", f"{s.tokens_per_s:,.0f}"),
        ("training loss", f"{s.train_bits:.3f} bits/byte"),
        ("held-out text", held_out),
        ("held-out loss", f"{s.held_out_bits:.3f} bits/byte"),
        ("gzip -9, same text", f"{s.gzip_bits:.3f} bits/byte"),
        ("xz -9e, same text", f"{s.xz_bits:.3f} bits/byte"),
        ("busiest expert / mean", "  ".join(f"{b:.2f}" for b in s.balance) + "  by layer"),
        ("checkpoint", s.path),
    ]
