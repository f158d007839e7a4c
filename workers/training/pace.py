"""How many steps fit into a stretch of time on this machine."""

from __future__ import annotations

import time

import torch

from .config import TrainConfig
from .data import Batches, load_corpus
from .folder import read_record
from .loop import RunOptions, torch_threads
from .state import TrainState
from .step import train_step

_PROBES = 4


def steps_for(minutes: float, config: TrainConfig, options: RunOptions) -> int:
    """Steps that take about ``minutes`` here; a run that ``options.out`` already holds keeps its own number.

    The measurement trains a throw-away model for a few steps in each phase.
    """
    record = read_record(options.out)
    if record is not None and options.resume:
        return record.config.recipe.steps
    recipe = config.recipe
    batches = Batches(load_corpus(options.data).train, recipe, config.seed)
    state = TrainState.initial(config)
    with torch_threads(options.threads):
        starts = [start for start, _ in recipe.phases]
        times_s = [_step_s(state, batches, config, start) for start in starts]
    steps = [end - start for start, end in zip(starts, [*starts[1:], recipe.steps], strict=True)]
    run_s = sum(n * step_s for n, step_s in zip(steps, times_s, strict=True))
    return max(1, round(minutes * 60 * recipe.steps / run_s))


def _step_s(state: TrainState, batches: Batches, config: TrainConfig, step: int) -> float:
    """Median seconds of a step like ``step``, after one to warm up."""
    times_s = []
    for _ in range(_PROBES + 1):
        begin = time.perf_counter()
        train_step(state.model, state.optimizer, torch.from_numpy(batches.at(step)), config.recipe, step)
        times_s.append(time.perf_counter() - begin)
    return sorted(times_s[1:])[_PROBES // 2]
