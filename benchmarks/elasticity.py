"""Changing the size of a running deployment, beside a cold restart and a second copy; and kills.

``python -m benchmarks.elasticity [--json FILE] [--quick] [--picture STEM]``. docs/benchmarks.md says what is measured
and what came out.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import get_args

import ray
from concertina.orchestrator import remote
from concertina.orchestrator.config import DeploymentConfig
from concertina.workers.model_files import ModelFiles

from .common import write_report
from .elasticity_baselines import bare_copies, serve_restarts
from .elasticity_cases import Row, Session, change, cold_restart, killed_owner, killed_worker, second_copy
from .elasticity_checkpoints import demo_checkpoint, large_checkpoint, weight_bytes
from .elasticity_deployment import Mode, configured, emulates
from .elasticity_memory import Sampler, sampling
from .elasticity_summary import summarise
from .elasticity_timeline import Timeline, record

CHANGES = (2, 3, 1)  # from 1 worker
QUICK_CHANGES = (2, 1)
PICTURED = (2, 1)  # one transition with everything in it: room, weights, the switch, and a hand-over
CLIENTS = {"demo": 8, "large": 4}
EMULATED_STEP_MS = {"demo": 15.0, "large": 150.0}  # at least, and
STEPS_OF_THEIR_OWN = 2.5  # times the longest step that computing took in the same run
EMULATED_ROUNDS = 2  # of changes and kills per repeat: they are quick, and a window of few steps is noisy
_NOT_WORTH_IT = {("demo", "reserved"), ("demo", "emulated_reserved")}
_CHECKPOINTS: dict[str, Callable[[Path], tuple[Path, str]]] = {"demo": demo_checkpoint, "large": large_checkpoint}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Parameters
    ----------
    checkpoints, modes : tuple of str
    repeats, other_repeats : int
        Of changes and kills; and of the other ways to another size, which take three times as long. With emulated
        steps changes and kills are measured twice as often.
    threads : int
        Compute threads of each worker.
    quick : bool
        One repeat of growing, shrinking and a kill, and nothing to compare with.
    picture : bool
        Whether to draw a timeline of one transition.
    """

    checkpoints: tuple[str, ...]
    modes: tuple[Mode, ...]
    repeats: int
    other_repeats: int
    threads: int
    quick: bool
    picture: bool

    @property
    def changes(self) -> Sequence[int]:
        return QUICK_CHANGES if self.quick else CHANGES

    def modes_of(self, checkpoint: str) -> Sequence[Mode]:
        """Those worth measuring.

        The demo's 0.01 GiB are there in no time, reserved or not. New memory for the large one's takes seconds of a
        core until the host has found it, unless it is reserved, as an accelerator's is.
        """
        return [mode for mode in self.modes if (checkpoint, mode) not in _NOT_WORTH_IT]

    def rounds(self, mode: Mode) -> int:
        """How often changes and kills are measured."""
        return self.repeats * (EMULATED_ROUNDS if emulates(mode) else 1)

    def pictured(self, checkpoint: str) -> Mode | None:
        """The mode that the picture is of: the last one with steps of their own length."""
        own = [mode for mode in self.modes_of(checkpoint) if not emulates(mode)]
        return own[-1] if self.picture and own and checkpoint == self.checkpoints[0] else None

    @property
    def watch_s(self) -> float:
        return 1.5 if self.quick else 3.0


@dataclass
class Bench:
    """One run: rows and a timeline as they come."""

    options: Options
    folder: Path
    sampler: Sampler
    rows: list[Row]
    timeline: Timeline | None = None

    async def run(self) -> None:
        for name in self.options.checkpoints:
            checkpoint, what = _CHECKPOINTS[name](self.folder)
            print(f"{name}: {what}, {weight_bytes(checkpoint) / 2**30:.2f} GiB", flush=True)
            for mode in self.options.modes_of(name):
                await self._session(name, what, checkpoint, mode)

    async def _session(self, name: str, what: str, checkpoint: Path, mode: Mode) -> None:
        options = self.options
        step_ms = self._emulated_step_ms(name) if emulates(mode) else 0.0
        config = configured(str(checkpoint), mode, 1, options.threads, step_ms)
        model = ModelFiles.open(str(checkpoint))
        clients, vocabulary = CLIENTS[name], model.config.vocab_size
        labels = {"checkpoint": name, "what": what, "weight_bytes": weight_bytes(checkpoint), "mode": mode}
        if step_ms:
            labels["emulated_step_ms"] = step_ms
        await asyncio.to_thread(self._restarts, labels, config)
        session = await Session.start(config, self.sampler, clients, vocabulary, options.watch_s)
        try:
            for repeat in range(options.rounds(mode)):
                numbered = {**labels, "repeat": repeat}
                await self._changes(session, numbered)
                if repeat < options.other_repeats:
                    await self._other_ways(session, numbered)
            if mode == options.pictured(name):
                await session.running.scale(PICTURED[0])
                self.timeline = await record(session, PICTURED[1])
        finally:
            await session.stop()
            self.rows.append({**labels, "case": "streams", "dtype": model.dtype, "clients": clients, **session.streams})
        if not options.quick:
            changed = [row for row in self.rows if row["case"] == "change" and labels.items() <= row.items()]
            for row in bare_copies(changed):
                self._keep({**labels, **row})

    def _emulated_step_ms(self, name: str) -> float:
        """Long enough that the host's cores are free for most of it: how long that is hangs on the machine."""
        own = [row for row in self.rows if (row["checkpoint"], row["case"]) == (name, "change")]
        steps = defaultdict[str, list[float]](list)
        for row in own:
            if "emulated_step_ms" not in row:
                steps[row["change"]].append(max(row["step_ms"], row["later_step_ms"]))
        longest_ms = max((median(values) for values in steps.values()), default=0.0)
        return max(EMULATED_STEP_MS[name], 5.0 * ceil(STEPS_OF_THEIR_OWN * longest_ms / 5.0))

    def _restarts(self, labels: Row, config: DeploymentConfig) -> None:
        for repeat in range(self.options.other_repeats):
            for row in serve_restarts(config, self.options.changes):
                self._keep({**labels, "repeat": repeat, **row})

    async def _changes(self, session: Session, labels: Row) -> None:
        for workers in self.options.changes:
            await self._note(labels, change(session, workers))
            if workers == 2:
                await self._note(labels, killed_worker(session))
                if not self.options.quick:
                    await self._note(labels, killed_owner(session))

    async def _other_ways(self, session: Session, labels: Row) -> None:
        for workers in self.options.changes:
            await self._note(labels, cold_restart(session, workers))
        for workers in self.options.changes:
            await self._note(labels, second_copy(session, workers))

    async def _note(self, labels: Row, case: Awaitable[Row]) -> None:
        self._keep({**labels, **await case})

    def _keep(self, row: Row) -> None:
        row = {**row, "load_average": os.getloadavg()[0]}
        self.rows.append(row)
        shown = {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}
        print(f"{row['checkpoint']} {row['mode']} {row['case']} {row['change']}: {shown}", flush=True)


def run(bench: Bench) -> None:
    """Everything, in a Ray of its own."""
    remote.join_or_start(remote.LOCAL, max(bench.options.changes), verbose=False)
    try:
        asyncio.run(bench.run())
    finally:
        ray.shutdown()


def report(bench: Bench, picture: str | None, json: str | None) -> None:
    """Print and write what there is; also what a run had measured before it failed."""
    summary = summarise(bench.rows)
    for name, value in summary.items():
        print(f"{name}: {value}")
    details: list[Row] = list(bench.rows)
    if bench.timeline is not None and picture is not None:
        details.append({"case": "timeline", **asdict(bench.timeline)})
        from .elasticity_plot import plot

        print(*plot(Path(picture), bench.timeline))
    write_report(json, "elasticity", summary, details)


def options_of(args: argparse.Namespace) -> Options:
    """A quick run is one of the demo's checkpoint in shared memory."""
    quick = bool(args.quick)
    return Options(
        checkpoints=("demo",) if quick else tuple(args.checkpoints.split(",")),
        modes=("shared",) if quick else tuple(args.modes.split(",")),
        repeats=1 if quick else args.repeats,
        other_repeats=0 if quick else args.other_repeats,
        threads=args.threads,
        quick=quick,
        picture=args.picture is not None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--quick", action="store_true", help="the demo's checkpoint, 1 to 2 to 1 workers and one kill")
    parser.add_argument("--repeats", type=int, default=3, help="repeats that medians are taken over")
    parser.add_argument("--other-repeats", type=int, default=2, help="of restarts and second copies")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of each worker")
    parser.add_argument("--checkpoints", default=",".join(_CHECKPOINTS), help="which, with commas")
    parser.add_argument("--modes", default=",".join(get_args(Mode)), help="memory modes, emulated or not; with commas")
    parser.add_argument("--picture", metavar="STEM", help="draw a timeline of one transition to STEM.png and STEM.svg")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="concertina-elasticity-") as folder, sampling(Path(folder)) as sampler:
        bench = Bench(options_of(args), Path(folder), sampler, [])
        try:
            run(bench)
        finally:
            report(bench, args.picture, args.json)


if __name__ == "__main__":
    main()
