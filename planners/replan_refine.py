"""A layer's re-plan improved by small integer programs over a few devices at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from .milp import MilpOptions
from .replan_exact import improve_exactly
from .replan_greedy import ReplanSearch, plan_greedy, tokens_inside
from .replan_task import LayerTask

_FLEXIBILITIES = (0.65, 1.0, 0.4, 0.25, 0.0)
FLEXIBILITIES = len(_FLEXIBILITIES)
_BYTES_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class RefineOptions:
    """How long to work on one layer.

    Parameters
    ----------
    rounds : int
        Most small programs.
    devices : int
        Devices re-arranged by one program; two more after each that did not help.
    hottest : int
        Loaded experts that may get further replicas there; one more after each that did not help.
    nodes : int
        Branch-and-bound nodes per program.
    seconds : float or None
        Time limit of one program, where less is not left.
    """

    rounds: int = 6
    devices: int = 6
    hottest: int = 3
    nodes: int = 200
    seconds: float | None = 1.0


def best_greedy(task: LayerTask, tries: int = FLEXIBILITIES) -> ReplanSearch:
    """The best of several greedy searches; stops at the first that cannot be improved."""
    best = plan_greedy(task, _FLEXIBILITIES[0])
    if all(task.kept_E) and task.min_nodes == 1:  # nothing had to be placed, so flexibility decided nothing
        return best
    for flexibility in _FLEXIBILITIES[1:tries]:
        if finished(best):
            break
        other = plan_greedy(task, flexibility)
        if other.score < best.score:
            best = other
    return best


def finished(search: ReplanSearch) -> bool:
    """Reached, with as few bytes as any answer must copy."""
    least = search.task.least_bytes() * (1 + _BYTES_TOLERANCE) + 0.999 * _smallest_step(search.task)
    return not search.unplaced and search.excess <= 0 and search.task.new_bytes(search.state) <= least


def _smallest_step(task: LayerTask) -> float:
    """With experts of one size, bytes come in whole experts: a bound may be rounded up."""
    first = task.bytes_E[0]
    return first if all(b == first for b in task.bytes_E) else 0.0


def refine(
    search: ReplanSearch, options: RefineOptions, seed: int, left_s: Callable[[], float] = lambda: inf
) -> ReplanSearch:
    """Re-arrange a few devices at a time while it helps and time is left; never worse than ``search``."""
    rng = random.Random(seed)
    best, failures = search, 0
    for _ in range(options.rounds):
        seconds = min(left_s(), inf if options.seconds is None else options.seconds)
        if finished(best) or best.unplaced or seconds <= 0:
            break
        devices, wanted = _part(best, options, failures, rng)
        limit_s = None if seconds == inf else seconds
        limits = MilpOptions(limit_s, 1e-4, node_limit=options.nodes, warm_start=True)
        state = improve_exactly(best.task, best.state, devices, wanted, limits)
        other = ReplanSearch(best.task, state or best.state)
        other.relieve()
        failures = 0 if other.score < best.score else failures + 1
        if other.score <= best.score:
            best = other
    return best


def _part(
    search: ReplanSearch, options: RefineOptions, failures: int, rng: random.Random
) -> tuple[list[int], set[int]]:
    """Devices to re-arrange, and experts that may get replicas there; more of both after failures."""
    task, state = search.task, search.state
    count, hottest = options.devices + 2 * failures, options.hottest + failures
    if search.excess > 0:
        over = [d for d in sorted(search.tight) if state.slack(d) < -state.eps]
        devices = [rng.choice(over)]
        roomy = [d for d in range(task.devices) if d not in search.tight]
        devices += rng.sample(roomy, min(len(roomy), count // 2))
    else:
        new_at = sorted({d for _, d in task.new_replicas(state)})
        devices = rng.sample(new_at, min(len(new_at), count // 2))
    others = [d for d in range(task.devices) if d not in devices]
    devices += rng.sample(others, min(len(others), max(0, count - len(devices))))
    inside_E = tokens_inside(search) if search.excess > 0 else list(task.tokens_E)
    busiest = sorted(range(task.experts), key=lambda e: (-inside_E[e], e))[:hottest]
    movable = {e for e, d in task.new_replicas(state) if d in devices}
    return sorted(devices), movable | set(busiest)
