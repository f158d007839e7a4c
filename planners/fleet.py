"""How many devices of each kind, at least cost, over a look-ahead horizon: the problem and its answer.

The mathematics is in `fleet_solve`. A *resource* is anything demand consumes and a device provides: prefill tokens a
second, decode tokens a second, bytes of memory that the weights need. What one device provides *within the latency
targets* is an argument, so that a measured curve, a simulator or a rule of thumb can supply it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from .fields import fail


@dataclass(frozen=True, slots=True)
class FleetKind:
    """One kind of device that can be rented, and how many of it there are now.

    Parameters
    ----------
    name : str
        For instance ``"h100"``.
    capacity_R : tuple of float
        What one serving device provides of each of the problem's resources, at least 0.
    price_per_s : float
        Cost of one device for a second, from the moment it is ordered.
    running : int
        Devices that serve at the start of period 0.
    arriving : tuple of int
        ``arriving[t]`` devices that were ordered earlier begin to serve at the start of period t.
    min_count, max_count : int
        Limits on devices paid for (serving or starting) in every period.
    start_cost, stop_cost : float
        Cost of ordering, and of giving back, one device.
    start_periods : int
        A device ordered at the start of period t serves from period ``t + start_periods``.
    """

    name: str
    capacity_R: tuple[float, ...]
    price_per_s: float
    running: int = 0
    arriving: tuple[int, ...] = ()
    min_count: int = 0
    max_count: int = 1_000_000
    start_cost: float = 0.0
    stop_cost: float = 0.0
    start_periods: int = 0

    def arriving_at(self, period: int) -> int:
        return self.arriving[period] if period < len(self.arriving) else 0

    def arriving_after(self, period: int) -> int:
        """Devices ordered before the horizon that are still starting in ``period``."""
        return sum(self.arriving[period + 1 :])


@dataclass(frozen=True, slots=True)
class Forecast:
    """Demand for one resource, per period and quantile.

    ``demand_TQ[t][q]`` is the demand of period t at ``quantiles[q]``; a plain demand is one column at quantile 0.5.
    """

    quantiles: tuple[float, ...]
    demand_TQ: tuple[tuple[float, ...], ...]

    @classmethod
    def certain(cls, demand_T: Sequence[float]) -> Forecast:
        """A demand known for sure: every quantile is the same."""
        return cls((0.0, 1.0), tuple((float(d), float(d)) for d in demand_T))

    def at(self, quantile: float) -> tuple[float, ...]:
        """Demand per period at ``quantile``, linear between the given ones."""
        return tuple(self._between(quantile, row_Q) for row_Q in self.demand_TQ)

    def _between(self, quantile: float, row_Q: tuple[float, ...]) -> float:
        for i, q in enumerate(self.quantiles):
            if math.isclose(q, quantile, abs_tol=1e-12):
                return row_Q[i]
            if q > quantile:
                low, high = self.quantiles[i - 1], q
                part = (quantile - low) / (high - low)
                return row_Q[i - 1] * (1 - part) + row_Q[i] * part
        raise AssertionError("FleetProblem checks that targets lie within the quantiles")


@dataclass(frozen=True, slots=True)
class ServiceTarget:
    """What must hold in every period: the demand at ``quantile`` uses at most ``max_utilisation`` of the capacity."""

    resource: str
    quantile: float = 0.95
    max_utilisation: float = 1.0


@dataclass(frozen=True)
class FleetProblem:
    """Everything that a fleet plan depends on; validated once.

    Parameters
    ----------
    period_s : float
        Length of a period.
    resources : tuple of str
        Names, in the order of `FleetKind.capacity_R` and ``forecasts``.
    kinds : tuple of FleetKind
    forecasts : tuple of Forecast
        One per resource, all over the same periods.
    targets : tuple of ServiceTarget
        A resource without a target is not constrained.
    shortfall_price : float or None
        Cost of one unit of a target's demand not covered for one second; None: every target must hold.

    Raises
    ------
    OperatorError
        A field is out of range or does not fit the others; the message names it.
    """

    period_s: float
    resources: tuple[str, ...]
    kinds: tuple[FleetKind, ...]
    forecasts: tuple[Forecast, ...]
    targets: tuple[ServiceTarget, ...]
    shortfall_price: float | None = None

    def __post_init__(self) -> None:
        _expect(_positive(self.period_s), "period_s", self.period_s, "a number above 0")
        _expect(len(set(self.resources)) == len(self.resources) > 0, "resources", self.resources, "distinct names")
        _expect(len(self.kinds) > 0, "kinds", self.kinds, "at least one")
        names = [k.name for k in self.kinds]
        _expect(len(set(names)) == len(names), "kinds", names, "distinct names")
        price = self.shortfall_price
        _expect(price is None or _positive(price), "shortfall_price", price, "null or a number above 0")
        self._check_forecasts()
        for kind in self.kinds:
            self._check_kind(kind)
        for i, target in enumerate(self.targets):
            self._check_target(f"targets[{i}]", target)

    @property
    def periods(self) -> int:
        return len(self.forecasts[0].demand_TQ)

    def needed(self, target: ServiceTarget) -> tuple[float, ...]:
        """Capacity that ``target`` asks for, per period."""
        forecast = self.forecasts[self.resources.index(target.resource)]
        return tuple(d / target.max_utilisation for d in forecast.at(target.quantile))

    def _check_forecasts(self) -> None:
        _expect(
            len(self.forecasts) == len(self.resources),
            "forecasts",
            len(self.forecasts),
            f"one for each of {len(self.resources)} resources",
        )
        for name, forecast in zip(self.resources, self.forecasts, strict=True):
            where = f"forecasts[{name}]"
            q = forecast.quantiles
            rising = all(a < b for a, b in pairwise(q))
            _expect(bool(q) and rising and q[0] >= 0 and q[-1] <= 1, f"{where}.quantiles", q, "rising, within 0..1")
            _expect(self.periods > 0, where, forecast.demand_TQ, "at least one period")
            periods = len(forecast.demand_TQ)
            _expect(periods == self.periods, where, f"{periods} periods", f"{self.periods} periods, as the first")
            for t, row_Q in enumerate(forecast.demand_TQ):
                falling = any(a > b for a, b in pairwise(row_Q))
                good = len(row_Q) == len(q) and all(_at_least_0(d) for d in row_Q) and not falling
                _expect(good, f"{where}.demand[{t}]", row_Q, f"{len(q)} finite values, at least 0, not falling")

    def _check_kind(self, kind: FleetKind) -> None:
        where = f"kinds[{kind.name}]"
        good = len(kind.capacity_R) == len(self.resources) and all(_at_least_0(c) for c in kind.capacity_R)
        _expect(good, f"{where}.capacity", kind.capacity_R, f"{len(self.resources)} finite values, at least 0")
        for field in ("price_per_s", "start_cost", "stop_cost"):
            _expect(_at_least_0(getattr(kind, field)), f"{where}.{field}", getattr(kind, field), "at least 0")
        for field in ("running", "min_count", "start_periods"):
            value = getattr(kind, field)
            _expect(value == int(value) and value >= 0, f"{where}.{field}", value, "a whole number, at least 0")
        _expect(all(a >= 0 for a in kind.arriving), f"{where}.arriving", kind.arriving, "whole numbers, at least 0")
        limit = max(kind.min_count, kind.arriving_after(0))
        expected = f"at least {limit} (min_count {kind.min_count}, still starting {kind.arriving_after(0)})"
        _expect(kind.max_count >= limit, f"{where}.max_count", kind.max_count, expected)

    def _check_target(self, where: str, target: ServiceTarget) -> None:
        known = target.resource in self.resources
        _expect(known, f"{where}.resource", target.resource, f"one of {', '.join(self.resources)}")
        q = self.forecasts[self.resources.index(target.resource)].quantiles
        inside = q[0] - 1e-12 <= target.quantile <= q[-1] + 1e-12
        _expect(inside, f"{where}.quantile", target.quantile, f"within the forecast's {q[0]}..{q[-1]}")
        utilisation = target.max_utilisation
        _expect(0 < utilisation <= 1, f"{where}.max_utilisation", utilisation, "above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class Shortage:
    """A target that cannot be met: the most that could be provided falls ``lack`` short of ``needed``."""

    resource: str
    period: int
    needed: float
    lack: float

    def __str__(self) -> str:
        return (
            f"period {self.period}: {self.resource}: needs {self.needed:g}, "
            f"at most {self.needed - self.lack:g} can be there ({self.lack:g} too little)"
        )


@dataclass(frozen=True, slots=True)
class FleetReason:
    """Why a kind has this many devices from ``first`` to ``last`` period (inclusive)."""

    kind: str
    first: int
    last: int
    count: int
    text: str


@dataclass(frozen=True, slots=True)
class FleetCost:
    """Cost over the horizon by term."""

    running: float
    starting: float
    stopping: float
    shortfall: float

    @property
    def total(self) -> float:
        return self.running + self.starting + self.stopping + self.shortfall


@dataclass(frozen=True)
class FleetPlan:
    """How many devices of each kind serve, are ordered and are given back in each period.

    ``serving_KT[k][t]``, ``started_KT``, ``stopped_KT``: counts by kind and period; orders act at the start of a
    period. ``bound`` is a proved lower bound on the cost. An ``infeasible`` plan has no counts and names its
    ``shortages``; ``unknown`` means that the solver stopped before it found a plan.
    """

    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    serving_KT: tuple[tuple[int, ...], ...] = ()
    started_KT: tuple[tuple[int, ...], ...] = ()
    stopped_KT: tuple[tuple[int, ...], ...] = ()
    cost: FleetCost | None = None
    bound: float | None = None
    shortages: tuple[Shortage, ...] = ()
    reasons: tuple[FleetReason, ...] = ()


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _at_least_0(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _expect(good: bool, field: str, value: object, expected: str) -> None:
    if not good:
        fail(f"fleet: {field}", value, expected)
