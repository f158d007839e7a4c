"""The scalable search of one layer: attempts in order of promise, each improved by local search."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice, zip_longest

import numpy as np

from .assemble import shares_R, without_idle
from .bounds import count_bound, replicas_needed, step_bound
from .construct import Greed, longest_first, water_filled
from .cost import Replicas, case_times_CD
from .exact import Exact, exact_method
from .fields import FloatArray
from .fill import Target, cut_for, filled
from .improve import Search
from .kick import kicked
from .layout import Layout
from .pairing import Pairing, alike, pairable
from .params import Params
from .price_bound import Pricing
from .problem import Objective
from .recipe import TRIES, followed
from .risk import risk
from .robust import FIRST_SWEEPS, Cases, RobustSearch
from .units import LayerProblem
from .value_bound import value_bound
from .wrap import Wrap, wrapped

GREEDS = (Greed(1.0), Greed(0.0, by_quota=False), Greed(0.0), Greed(0.5))
STEPS = (0, 1, 3, 8, 18, 40, 100, 250)
"""Replicas beyond the least needed that are tried."""
TARGETS = ((0.01, 0.5), (0.001, 1.0), (0.03, 1.0), (0.01, 0.0), (0.03, 0.5), (0.06, 0.5), (0.03, 0.0), (0.06, 0.0))
"""Times above the bound, and company beside full pieces, that are aimed at."""
FINE = ((0.002, 0.02), (0.0015, 0.01), (0.003, 0.03), (0.0015, 0.005), (0.001, 0.01))
COARSE = ((0.002, 0.08), (0.06, 0.12), (0.005, 0.08), (0.01, 0.03), (0.03, 0.01))
"""Times above the bound, and waste per device, with which devices are filled and the last ones cut: the second where
reading is heavy (`LayerProblem.heavy`)."""
FEW = 3
"""Units per device up to which filling devices matters most, given spare slots: such layouts are tried first."""
FIRST_WRAPS = 3

SPREADS = (3.0, 1.0, 0.0)
PARTS = (1.0, 0.5, 0.25, 0.0)
"""How `broad_attempts` spreads replicas over units, and parts of the free slots that it uses."""
MOVES = 50
"""Moves over all cases in one piece of work."""
ROBUST_PATIENCE = 40
"""Such pieces of work without a better layout after which a layer is given up."""
FRESH, FRESH_PAIRS = 5, 4
"""Pieces of work before every other one disturbs the best layout instead; the second where `Pairing` does."""
SHAPES, NEAR = 1000, 5e-4
"""Shapes that `Pairing` judges in one piece of work, and the distance to the bound at which it stops."""
UNPRICED = 1
"""Pieces of work before a better bound is sought, where reading is heavy."""
PATIENCE = 8
"""Pieces of work without success after which a layer is given up, once fresh layouts are used up."""


def case_times(layer: LayerProblem, layout: Layout, objective: Objective) -> FloatArray:
    """Time of every device in every case, shape (C, D) (eq. 4, 6)."""
    replicas = Replicas(layout.unit_R, layout.device_R, np.array(shares_R(layer, layout)))
    read_R = layer.read_UD[layout.unit_R, layout.device_R]
    fixed_CD = layer.base_CD + np.bincount(layout.device_R, weights=read_R, minlength=layer.devices)
    per_batch = objective.split == "per_batch"
    return case_times_CD(replicas, layer.tokens_CU, layer.token_s_D, fixed_CD, per_batch)


def layer_cost(layer: LayerProblem, layout: Layout, objective: Objective) -> float:
    """The layer's step term and moves for a layout (eq. 7 to 9); communication is left out.

    Splits of several cases are balanced together, nearly as well as alone: the cost is an upper bound.
    """
    if objective.split == "per_batch" and len(layer.tokens_CU) > 1:
        time_C = Cases(layer, layout).times(FIRST_SWEEPS).max(axis=0)
    else:
        time_C = case_times(layer, layout, objective).max(axis=1)
    step = risk(layer.scenario_C, layer.case_weight_C, time_C, objective.tail)
    return step + moved_cost(layer, layout)


def moved_cost(layer: LayerProblem, layout: Layout) -> float:
    """Eq. 9 for one layer."""
    new_R = ~layer.held_UD[layout.unit_R, layout.device_R]
    return layer.moved_byte_s * float(layer.bytes_U[layout.unit_R[new_R]].sum())


Attempt = Callable[[], Layout | None]


def attempts(layer: LayerProblem, bound_s: float) -> Iterator[Attempt]:
    """First layouts in order of promise: longest first with equal and with full pieces, filling, and wrapping."""
    counts = list(water_filled(layer))
    first = max(0, replicas_needed(layer, bound_s) - int(counts[0].sum()))
    ends = sorted({min(first + step, len(counts) - 1) for step in STEPS})
    equal = (partial(longest_first, layer, counts[at], greed) for at in ends for greed in GREEDS)
    if not layer.plain:
        yield from equal
        return
    targets = [Target(bound_s * (1.0 + above), company) for above, company in TARGETS]
    full = (partial(_cut, layer, target, greed) for target in targets for greed in GREEDS)
    fill = (partial(filled, layer, target) for target in targets)
    ways = (*COARSE, *FINE) if layer.heavy(bound_s) else (*FINE, *COARSE)
    wrap = (partial(wrapped, layer, Wrap(bound_s * (1.0 + above), waste)) for above, waste in ways)
    if layer.devices < layer.units <= min(FEW * layer.devices, int(layer.slots_D.sum()) - 1):
        yield from islice(wrap, FIRST_WRAPS)
    for group in zip_longest(equal, wrap, fill, full):
        yield from (attempt for attempt in group if attempt is not None)


def _cut(layer: LayerProblem, target: Target, greed: Greed) -> Layout | None:
    cut = cut_for(layer, target)
    return None if cut is None else longest_first(layer, cut[0], replace(greed, piece=cut[1]))


def broad_attempts(layer: LayerProblem) -> Iterator[Attempt]:
    """First layouts for several cases with the split as recourse: replicas broadly, for the freedom they give.

    Counts follow the mean plus two standard deviations over cases; a constant on top spreads replicas over more units.
    """
    deviation_CU = (layer.tokens_CU - layer.tokens_U) ** 2
    risk_U = layer.tokens_U + 2.0 * np.sqrt(layer.case_weight_C @ deviation_CU)
    for spread in SPREADS:
        counts = list(water_filled(layer, risk_U + spread * float(layer.tokens_U.mean())))
        for part in PARTS:
            yield partial(longest_first, layer, counts[int(part * (len(counts) - 1))], Greed())


class LayerSearch:
    """Anytime search of one layer; `advance` does one piece of work."""

    def __init__(
        self,
        layer: LayerProblem,
        objective: Objective,
        params: Params,
        start: Layout | None,
        pricing: Pricing | None = None,
    ) -> None:
        self.layer = layer
        self.objective = objective
        self.params = params
        alone = len(layer.tokens_CU) == 1
        self._exact = exact_method(layer) if alone else None
        counted_s = count_bound(layer, layer.tokens_U, layer.base_D)
        priced = alone and layer.plain and layer.heavy(counted_s) and self._exact is None
        self._pricing = (pricing or Pricing()) if priced else None
        self.mean_bound_s = counted_s if priced else value_bound(layer, layer.tokens_U, layer.base_D, counted_s)
        self.bound_s = self.mean_bound_s
        if not alone:
            self.bound_s = step_bound(layer, objective.tail, objective.split == "per_batch")
        self.best: Layout | None = None
        self.cost_s = np.inf
        self.pieces = 0
        self.exhausted = False
        self._pairs = priced and alike(layer)
        self._several = objective.split == "per_batch" and not alone
        self._todo = broad_attempts(layer) if self._several else attempts(layer, self.mean_bound_s)
        self._robust: RobustSearch | None = None
        self._random = random.Random(params.seed + layer.layer)
        self._idle = 0
        if start is not None:
            self._try(start)

    @property
    def excess_s(self) -> float:
        """Cost above the bound."""
        return self.cost_s - self.bound_s

    def advance(self, gap: float) -> None:
        """Make and improve one more attempt; sets ``exhausted`` after the last."""
        self.pieces += 1
        if self._exact is not None:
            self._exactly(self._exact)
            return
        if self._pricing is not None and self.pieces > UNPRICED and self.best is not None:
            self._tighten(self._pricing)
            return
        if self._kicks() and self.pieces > (FRESH_PAIRS if self._pairs else FRESH) and self.pieces % 2:
            self._disturb(gap)
            return
        attempt = next(self._todo, None)
        if attempt is None:
            self._after_attempts(gap)
            return
        layout = attempt()
        if layout is not None:
            self._try(layout, gap)

    def _exactly(self, method: Exact) -> None:
        """A kind of layer for which there is an answer with its proof, or nearly: ask for it once, from any layout."""
        self._exact = None
        while self.best is None:
            attempt = next(self._todo, None)
            if attempt is None:
                return
            layout = attempt()
            if layout is not None:
                self.offer(layout)
        moved_s = moved_cost(self.layer, self.best)
        self.bound_s, layout = method(self.bound_s, self.cost_s - moved_s)
        self.mean_bound_s = self.bound_s
        if layout is not None:
            self._try(layout)

    def _tighten(self, pricing: Pricing) -> None:
        """Seek a better bound once, and aim first layouts at it if it is one."""
        self._pricing = None
        moved_s = moved_cost(self.layer, self.best) if self.best is not None else 0.0
        bound_s, found = pricing.bound(self.layer, self.mean_bound_s, self.cost_s - moved_s)
        if found:
            self.bound_s = self.mean_bound_s = bound_s
            recipes = (partial(followed, self.layer, priced, *way) for way in TRIES for priced in found)
            self._todo = chain(recipes, attempts(self.layer, bound_s))

    def _kicks(self) -> bool:
        return self.best is not None and self.layer.plain and not self._several and self.layer.devices >= 3

    def _disturb(self, gap: float) -> None:
        """Change the best layout: its cuts where which replicas share a device follows from them, else some devices."""
        assert self.best is not None
        before = self.cost_s
        if self._pairs and pairable(self.layer, self.best):
            time_s = before - moved_cost(self.layer, self.best)
            pairing = Pairing(self.layer, self.best, time_s, self._random.randrange(2**32))
            layout = pairing.run(self.mean_bound_s * (1.0 + NEAR), SHAPES)
        else:
            layout = kicked(self.layer, self.best, self._random)
        if layout is not None:
            self._try(layout, gap)
        self._idle = 0 if self.cost_s < before else self._idle + 1

    def _after_attempts(self, gap: float) -> None:
        """No fresh layouts are left: disturb the best one, or for several cases go on with moves judged by all."""
        if self._kicks() and self._idle < PATIENCE:
            self._disturb(gap)
        elif self._several and self.best is not None and self._idle < ROBUST_PATIENCE:
            self._move_robustly()
        else:
            self.exhausted = True

    def _move_robustly(self) -> None:
        assert self.best is not None
        if self._robust is None:
            self._robust = RobustSearch(self.layer, self.best, self.objective, self.params.seed + self.layer.layer)
        if self._robust.run(MOVES):
            self._idle = 0
            layout = self._robust.layout()
            self.offer(layout, self._robust.best_s + moved_cost(self.layer, layout))
        else:
            self._idle += 1

    def _try(self, layout: Layout, gap: float = 0.0) -> None:
        if self._several:
            self.offer(layout)
            return
        search = Search(self.layer, layout)
        search.run(self.mean_bound_s, gap, self.params.rounds)
        self.offer(search.layout())

    def offer(self, layout: Layout, cost: float | None = None) -> None:
        """Keep the layout, of this cost where that is known, if it is the best so far; no replica serves nothing."""
        if self.objective.split == "fixed":
            layout = without_idle(self.layer, layout)
        if cost is None:
            cost = layer_cost(self.layer, layout, self.objective)
        if cost < self.cost_s:
            self.best, self.cost_s = layout, cost

    def raise_bound(self, bound_s: float) -> None:
        """Take over a bound on this layer's cost that another method proved."""
        self.bound_s = min(self.cost_s, max(self.bound_s, bound_s))
