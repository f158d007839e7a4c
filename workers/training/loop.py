"""`train`: from a configuration and a folder of text to a checkpoint and a summary."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import OperatorError
from .balance import max_over_mean
from .config import TrainConfig
from .data import Batches, Corpus, load_corpus
from .evaluate import gzip_bits, held_out_bits, xz_bits
from .export import write_checkpoint
from .folder import RECORD, RunRecord, claim
from .report import Progress, RunStart, Silent, Summary, TrainingStopped
from .state import STATE, TrainState
from .step import train_step

_LAST = 50


def _never() -> bool:
    return False


@dataclass(frozen=True)
class RunOptions:
    """Where a run lives and how it is run; none of it changes the numbers, except ``threads`` in the last bits.

    Parameters
    ----------
    out : Path
        Folder of the checkpoint and, until the run is finished, of its state.
    data : Path or None
        Folder of text files; None means the standard library's sources.
    resume : bool
        Go on with what ``out`` holds; False discards it.
    threads : int or None
        Threads of matrix products; None means one per core that this process may use.
    save_every : int
        Steps between two saved states.
    stop : callable
        Asked after every step; True saves the state and raises `TrainingStopped`.
    """

    out: Path
    data: Path | None = None
    resume: bool = True
    threads: int | None = None
    save_every: int = 200
    stop: Callable[[], bool] = _never


@dataclass(frozen=True)
class _Spent:
    steps: int
    wall_s: float
    cpu_s: float


def train(config: TrainConfig, options: RunOptions, progress: Progress | None = None) -> Summary:
    """Train a model and write it as a Hugging Face checkpoint; a finished run returns its summary at once.

    Equal configuration, data, machine and thread count give equal bits, however often the run was interrupted.

    Raises
    ------
    OperatorError
        Bad data or folder, a folder that holds something else, a damaged state, or a loss that is not finite.
    TrainingStopped
        ``options.stop`` said so.
    """
    watcher = Silent() if progress is None else progress
    corpus = load_corpus(options.data)
    batches = Batches(corpus.train, config.recipe, config.seed)
    record = claim(options.out, config, corpus, options.resume)
    if record.summary is not None and (options.out / "config.json").exists():
        return Summary.from_dict({**record.summary, "path": str(options.out)}, str(options.out / RECORD))
    with torch_threads(options.threads):
        state = TrainState.initial(config)
        if (options.out / STATE).exists():
            state.load(options.out)
        watcher.start(_start(config, state, corpus))
        spent = _run_steps(config, options, state, batches, watcher)
        summary = _summarise(config, state, corpus, spent, watcher)
    return _finish(options.out, record, state, summary)


def _start(config: TrainConfig, state: TrainState, corpus: Corpus) -> RunStart:
    recipe = config.recipe
    sizes = (len(corpus.train), len(corpus.held_out_text))
    return RunStart(
        *state.model.parameter_count(), *sizes, corpus.source, state.step, recipe.steps, recipe.batch_tokens
    )


def _run_steps(
    config: TrainConfig, options: RunOptions, state: TrainState, batches: Batches, progress: Progress
) -> _Spent:
    first, wall_s, cpu_s = state.step, time.perf_counter(), time.process_time()
    while state.step < config.recipe.steps:
        rows = torch.from_numpy(batches.at(state.step))
        result = train_step(state.model, state.optimizer, rows, config.recipe, state.step)
        if not result.grad_norm < float("inf"):
            raise OperatorError(f"lr: step {state.step + 1}: the gradient is not finite; try a smaller --lr")
        state.step += 1
        state.bits_per_byte.append(result.bits_per_byte)
        progress.step(state.step, result)
        stopping = options.stop() and state.step < config.recipe.steps
        if stopping or state.step % options.save_every == 0 or state.step == config.recipe.steps:
            state.save(options.out)
        if stopping:
            raise TrainingStopped(state.step, config.recipe.steps, str(options.out))
    return _Spent(state.step - first, time.perf_counter() - wall_s, time.process_time() - cpu_s)


def _summarise(config: TrainConfig, state: TrainState, corpus: Corpus, spent: _Spent, progress: Progress) -> Summary:
    bits, counts_LE = held_out_bits(state.model, corpus.held_out, config.recipe.seq_len, progress.evaluating)
    total, active = state.model.parameter_count()
    last, text = state.bits_per_byte[-_LAST:], corpus.held_out_text
    return Summary(
        path="",
        parameters=total,
        active_parameters=active,
        steps=state.step,
        tokens=state.step * config.recipe.batch_tokens,
        session_steps=spent.steps,
        wall_s=spent.wall_s,
        cpu_s=spent.cpu_s,
        tokens_per_s=spent.steps * config.recipe.batch_tokens / spent.wall_s,
        train_bits=sum(last) / len(last),
        held_out_bits=bits,
        gzip_bits=gzip_bits(text),
        xz_bits=xz_bits(text),
        held_out_files=len(corpus.held_out_files),
        held_out_bytes=len(text),
        balance=tuple(max_over_mean(counts_LE)),
    )


def _finish(out: Path, record: RunRecord, state: TrainState, summary: Summary) -> Summary:
    """Checkpoint first, then the record that calls it finished, then the state goes: every crash can be resumed."""
    summary = dataclasses.replace(summary, path=str(out))
    write_checkpoint(state.model, out)
    dataclasses.replace(record, summary=summary.to_dict()).write(out)
    (out / STATE).unlink(missing_ok=True)
    return summary


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Torch's thread count for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads if threads is not None else len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
