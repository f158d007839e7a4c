"""The scalable method: layers independently, anytime, deterministic for a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from .align import affine, aligned
from .assemble import layout_of, placement_of
from .bounds import problem_bound
from .cost import evaluate
from .layer_search import LayerSearch
from .params import Params
from .placement import Placement
from .price_bound import Pricing
from .problem import PlacementProblem
from .solution import Infeasible, Lack, Progress, Solution, StoppingRule
from .units import LayerProblem, layer_problems

Report = Callable[[Progress], None]
ALIGN_PART = 0.1
"""Part of the time limit kept for `align`, where there is affinity."""


class Run:
    """Searches of all layers under one stopping rule, whose time runs from ``began_s``: making them took some."""

    def __init__(self, searches: list[LayerSearch], stop: StoppingRule, report: Report | None, began_s: float) -> None:
        self.searches = searches
        self.stop = stop
        self.report = report
        self.began_s = began_s
        self.reason = "iterations"

    def out_of_time(self) -> bool:
        return self.stop.now() - self.began_s >= self.stop.time_limit_s

    def start(self) -> list[LayerProblem]:
        """Find a first layout of every layer; returns the layers for which there is none."""
        lost = []
        for done, search in enumerate(self.searches):
            while search.best is None and not search.exhausted:
                search.advance(self.stop.gap)
            if search.best is None:
                lost.append(search.layer)
            self._tell(done + 1)
        return lost

    def improve(self) -> None:
        """Work on the layer with most to gain until the gap is reached, time is up, or nothing is left to try."""
        while True:
            if self._excess() <= self.stop.gap * self._cost():
                self.reason = "gap"
                return
            if self.out_of_time():
                self.reason = "time limit"
                return
            open_ = [s for s in self.searches if not s.exhausted and s.pieces < self.stop.iterations]
            if not open_:
                return
            max(open_, key=lambda s: s.excess_s / (1 + s.pieces)).advance(self.stop.gap)
            self._tell(len(self.searches))

    def _cost(self) -> float:
        return float(sum(s.cost_s for s in self.searches))

    def _excess(self) -> float:
        return float(sum(s.excess_s for s in self.searches))

    def _tell(self, done: int) -> None:
        if self.report is not None:
            found = [s for s in self.searches if np.isfinite(s.cost_s)]
            cost, bound = float(sum(s.cost_s for s in found)), float(sum(s.bound_s for s in found))
            elapsed_s = self.stop.now() - self.began_s
            self.report(Progress(done, len(self.searches), cost, bound, elapsed_s))


def solve_scalable(
    problem: PlacementProblem,
    params: Params,
    stop: StoppingRule,
    report: Report | None = None,
    start: Placement | None = None,
) -> Solution | Infeasible:
    """Plan every layer by attempts, local search and large neighbourhoods; then align the layers for affinity.

    Returns `Infeasible` (not proven) where no attempt found room for every replica.
    """
    began_s = stop.now()
    layers = layer_problems(problem)
    starts = [None if start is None else layout_of(problem, layer, start) for layer in layers]
    pricing = Pricing()
    searches = [LayerSearch(la, problem.objective, params, st, pricing) for la, st in zip(layers, starts, strict=True)]
    part = replace(stop, time_limit_s=stop.time_limit_s * (1.0 - ALIGN_PART)) if affine(problem) else stop
    run = Run(searches, part, report, began_s)
    lost = run.start()
    if lost:
        return Infeasible(tuple(_no_room(layer) for layer in lost), proven=False)
    run.improve()
    layouts = [s.best for s in searches if s.best is not None]
    in_time = partial(within, stop, began_s)
    placement = placement_of(problem, layers, aligned(problem, layers, layouts, in_time))
    bound = problem_bound(problem, layers, np.array([s.bound_s for s in searches]))
    return Solution(placement, evaluate(problem, placement), bound, run.reason, "scalable")


def within(stop: StoppingRule, began_s: float) -> bool:
    """Whether there is time left of a run that began at ``began_s``."""
    return stop.now() - began_s < stop.time_limit_s


def _no_room(layer: LayerProblem) -> Lack:
    need = float(layer.width_U.sum() * layer.min_nodes)
    return Lack(f"layer {layer.layer}: no assignment found", need, float(layer.slots_D.sum()), "slots")
