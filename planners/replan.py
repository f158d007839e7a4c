"""When devices come, go or slow down, or loads drift: the placement that is balanced again with few new replicas.

A layer is balanced to ``b`` when its slowest device takes at most 1/b of the time that no placement can beat
(eq. 11 to 13 of ``planners/README.md``, for the loads averaged over scenarios and regimes). Every layer is planned
greedily, which takes tens of milliseconds; what time is left goes to small integer programs, first for layers that
missed the balance, then for those that copy more than the proved least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from .advise import settled
from .assemble import placement_of
from .assignment import match_slots
from .bounds import case_bound
from .fields import FloatArray, fail, finite
from .lacks import lacks
from .layout import device_time_D
from .placement import Placement
from .problem import PlacementProblem
from .replan_greedy import ReplanSearch
from .replan_refine import FLEXIBILITIES, RefineOptions, best_greedy, finished, refine
from .replan_repair import layout_of_state, repaired
from .replan_task import LayerTask
from .solution import Infeasible, Lack, Progress, StoppingRule
from .units import LayerProblem, layer_problems

GREEDY_PART = 0.5
"""Part of the time limit that the greedy pass may take before it tries each layer only once."""
_MORE_ROUNDS = 4
"""Times as many small programs for a layer that missed the balance."""


@dataclass(frozen=True)
class ReplanRules:
    """What to reach, and how long to try.

    Parameters
    ----------
    balance : float
        In (0, 1]: least part of the best possible speed that every layer shall reach.
    bound : callable
        The time that no placement of a layer can beat; `count_bound` is quicker, but may be lower: layers are balanced
        better than asked for then, and copy more.
    refine : RefineOptions
        Small integer programs per layer.
    seed : int
        Choices of the devices they look at; the same seed gives the same plan.
    stop : StoppingRule
        Its clock and time limit end the refinement; the greedy pass always completes.
    """

    balance: float = 0.98
    bound: Callable[[LayerProblem, FloatArray, FloatArray], float] = case_bound
    refine: RefineOptions = field(default_factory=RefineOptions)
    seed: int = 0
    stop: StoppingRule = field(default_factory=lambda: StoppingRule(time_limit_s=30.0))

    def __post_init__(self) -> None:
        finite("replan: balance", self.balance, 0.0, 1.0)
        if self.balance == 0:
            fail("replan: balance", self.balance, "above 0")


@dataclass(frozen=True, eq=False)
class Replan:
    """A placement near the current one.

    Parameters
    ----------
    placement : Placement
    new_replicas_L : tuple of int
        Replicas to copy, per layer.
    moved_bytes, least_bytes : float
        Bytes to copy; no placement with the balance asked for copies less than ``least_bytes``.
    time_L, bound_L : ndarray
        Slowest device per layer at the mean loads, and the time no placement can beat; seconds.
    missed : tuple of int
        Layers below the balance asked for.
    reason : str
    """

    placement: Placement
    new_replicas_L: tuple[int, ...]
    moved_bytes: float
    least_bytes: float
    time_L: FloatArray
    bound_L: FloatArray
    missed: tuple[int, ...]
    reason: str

    @property
    def balance_L(self) -> FloatArray:
        """bound / time, per layer."""
        balance: FloatArray = self.bound_L / self.time_L
        return balance


@dataclass(slots=True)
class _Work:
    """One layer on its way."""

    layer: LayerProblem
    bound_s: float
    search: ReplanSearch

    @property
    def reached(self) -> bool:
        return not self.search.unplaced and self.search.excess <= 0


def replan(
    problem: PlacementProblem, rules: ReplanRules | None = None, progress: Callable[[Progress], None] | None = None
) -> Replan | Infeasible:
    """The placement within ``rules.balance`` of the best possible that copies few bytes from ``problem.current``.

    Tokens of replicas that stay are split afresh, which costs nothing; replicas are dropped freely where their slot
    is needed. Layers that cannot reach the balance come as near as the search finds, and are named in `Replan.missed`.

    Raises
    ------
    OperatorError
        ``problem.current`` is missing.
    """
    if problem.current is None:
        fail("replan: problem.current", None, "the current placement")
    rules = rules or ReplanRules()
    start_s = rules.stop.now()
    works: list[_Work] = []
    layers = layer_problems(problem)
    missing = tuple(lack for layer in layers for lack in lacks(layer))
    if missing:
        return Infeasible(missing)
    for layer in layers:
        bound_s = rules.bound(layer, layer.tokens_U, layer.base_D)
        slow = rules.stop.now() - start_s > GREEDY_PART * rules.stop.time_limit_s * len(works) / problem.layers
        works.append(_work(layer, bound_s, rules.balance, 1 if slow else FLEXIBILITIES))
        if progress:
            done = [w.bound_s for w in works]
            elapsed_s = rules.stop.now() - start_s
            progress(Progress(len(works), problem.layers, sum(done) / rules.balance, sum(done), elapsed_s))
    no_room = tuple(_lack(w, e) for w in works for e in w.search.unplaced)
    if no_room:
        return Infeasible(no_room, proven=False)
    reason = _refine_all(works, rules, start_s)
    return _answer(problem, works, reason)


def _work(layer: LayerProblem, bound_s: float, balance: float, tries: int) -> _Work:
    """One layer planned greedily, by local search too where that misses the balance."""
    work = _Work(layer, bound_s, best_greedy(LayerTask.of(layer, bound_s / balance), tries))
    if not work.reached and not work.search.unplaced:
        work.search = repaired(work.search, layer, bound_s, balance)
    return work


def _lack(work: _Work, unit: int) -> Lack:
    layer = work.layer
    free = int(layer.slots_D.sum()) - sum(len(flow) for flow in work.search.state.flow_E)
    return Lack(
        f"layer {layer.layer}: room for experts {layer.members[unit]}",
        float(layer.width_U[unit]),
        max(0, free),
        "slots",
    )


def _refine_all(works: list[_Work], rules: ReplanRules, start_s: float) -> str:
    """Small programs, worst layers first; returns why it ended."""

    def left_s() -> float:
        return start_s + rules.stop.time_limit_s - rules.stop.now()

    for work in sorted(works, key=_urgency):
        if not finished(work.search) and left_s() > 0:
            rounds = rules.refine.rounds * (1 if work.reached else _MORE_ROUNDS)
            options = replace(rules.refine, rounds=rounds)
            work.search = refine(work.search, options, rules.seed + work.layer.layer, left_s)
    if all(finished(w.search) for w in works):
        return "balanced with the fewest bytes possible"
    if left_s() <= 0:
        return "time limit"
    if all(w.reached for w in works):
        return "balanced; fewer bytes not found"
    return "balance not found in some layers"


def _urgency(work: _Work) -> tuple[bool, float]:
    """Layers that missed the balance first, then those farthest above the least bytes."""
    task = work.search.task
    return work.reached, task.least_bytes() - task.new_bytes(work.search.state)


def _answer(problem: PlacementProblem, works: list[_Work], reason: str) -> Replan:
    layouts = [settled(w.layer, layout_of_state(w.search.state)) for w in works]
    assert problem.current is not None
    placement = match_slots(problem.current, placement_of(problem, [w.layer for w in works], layouts))
    time_L = np.array([device_time_D(w.layer, layout).max() for w, layout in zip(works, layouts, strict=True)])
    return Replan(
        placement,
        tuple(len(w.search.task.new_replicas(w.search.state)) for w in works),
        sum(w.search.task.new_bytes(w.search.state) for w in works),
        sum(w.search.task.least_bytes() for w in works),
        time_L,
        np.array([w.bound_s for w in works]),
        tuple(w.layer.layer for w in works if not w.reached),
        reason,
    )
