"""When a solver stops, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .cost import Cost
from .fields import finite
from .placement import Placement

Clock = Callable[[], float]


def no_clock() -> float:
    """A clock that stands still: for runs limited by iterations alone."""
    return 0.0


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """When to stop; with an iteration limit and no time limit, equal inputs give equal plans.

    Parameters
    ----------
    time_limit_s : float
        Limit for all layers together, by ``now``.
    gap : float
        Stop once (cost - bound) / cost is at most this.
    iterations : int
        Most improvement rounds per layer.
    now : callable
        A monotonic clock in seconds, for instance ``time.monotonic``.
    """

    time_limit_s: float = 10.0
    gap: float = 1e-4
    iterations: int = 400
    now: Clock = no_clock

    def __post_init__(self) -> None:
        finite("stop: time_limit_s", self.time_limit_s)
        finite("stop: gap", self.gap)
        finite("stop: iterations", self.iterations)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a running solver is: the best cost and bound so far, in objective seconds."""

    layers_done: int
    layers: int
    cost: float
    bound: float
    elapsed_s: float


@dataclass(frozen=True)
class Solution:
    """A placement, what it costs, and how far from the optimum it can be.

    Parameters
    ----------
    placement : Placement
    cost : Cost
        By term and layer.
    bound : float
        No placement of this problem costs less.
    reason : str
        Why the solver stopped: ``optimal``, ``gap``, ``iterations``, ``time limit`` or ``baseline``.
    method : str
        The method that answered (never ``auto``).
    """

    placement: Placement
    cost: Cost
    bound: float
    reason: str
    method: str

    @property
    def gap(self) -> float:
        """(cost - bound) / cost, at least 0."""
        return max(0.0, 1.0 - self.bound / self.cost.total) if self.cost.total > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Lack:
    """One thing that does not fit: needed against available, in ``unit``."""

    what: str
    needed: float
    available: float
    unit: str

    def __str__(self) -> str:
        short = self.needed - self.available
        return f"{self.what}: needs {self.needed:g} {self.unit}, has {self.available:g} ({short:g} short)"


@dataclass(frozen=True, slots=True)
class Infeasible:
    """No placement keeps the rules: an answer, not an error.

    ``proven`` is False where a heuristic found nothing but cannot rule a placement out.
    """

    lacks: tuple[Lack, ...] = field(default_factory=tuple)
    proven: bool = True

    def __str__(self) -> str:
        return "infeasible: " + "; ".join(map(str, self.lacks))
