"""The planners at work for a deployment: where experts go first, and whether to move them later. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import OperatorError
from ..planners.advise import Horizon, advise
from ..planners.cluster import Cluster, Device
from ..planners.migrate import plan_migration
from ..planners.migration import MigrationProblem
from ..planners.model import Loads, ModelSpec
from ..planners.placement import Placement
from ..planners.problem import PlacementProblem
from ..planners.replan import ReplanRules, replan
from ..planners.solution import Clock, Infeasible, StoppingRule
from ..planners.solve import solve
from .core.layout import Seat

# Only ratios between devices matter here, and all CPU workers of a deployment have the same threads.
_CPU_FLOPS = 5e10
_CPU_BYTES_S = 1e10
_TIME_LIMIT_S = 2.0


@dataclass(frozen=True)
class Site:
    """What a placement is for: the devices, the model, and room for so many replicas beyond one each, per layer."""

    seats: Sequence[Seat]
    model: ModelSpec
    spare_slots: int = 0

    @property
    def slots(self) -> int:
        """Physical experts per device and layer."""
        return -(-(self.model.experts + self.spare_slots) // len(self.seats))

    def cluster(self) -> Cluster:
        model = self.model
        held = int((model.bytes_LE.max() * self.slots + model.shared_bytes) * model.layers) + 1
        return Cluster(tuple(Device(s.device, "cpu", held, _CPU_FLOPS, _CPU_BYTES_S, s.node) for s in self.seats))

    def problem(self, loads: Loads, current: Placement | None = None) -> PlacementProblem:
        return PlacementProblem(self.cluster(), self.model, loads, slots=self.slots, current=current)


def even_loads(model: ModelSpec) -> Loads:
    """What is assumed before anything was measured."""
    return Loads(np.ones((model.layers, model.experts)))


def first_placement(site: Site, loads: Loads, now: Clock) -> Placement:
    """The best placement that ``auto`` finds.

    Raises
    ------
    OperatorError
        There is none; says what does not fit.
    """
    found = solve(site.problem(loads), stop=StoppingRule(time_limit_s=_TIME_LIMIT_S, now=now))
    if isinstance(found, Infeasible):
        raise OperatorError(f"placement: {found}")
    return found.placement


@dataclass(frozen=True)
class Verdict:
    """Where to go, or None for staying, and why."""

    placement: Placement | None
    reason: str


def better_placement(site: Site, loads: Loads, current: Placement, horizon_s: float, now: Clock) -> Verdict:
    """Whether another placement is worth reaching from ``current``, with the numbers."""
    problem = site.problem(loads, current)
    found = replan(problem, ReplanRules(stop=StoppingRule(time_limit_s=_TIME_LIMIT_S, now=now)))
    if isinstance(found, Infeasible):
        return Verdict(None, f"stay: {found}")
    way = plan_migration(MigrationProblem(problem.cluster, site.model, current, found.placement))
    if isinstance(way, Infeasible):
        return Verdict(None, f"stay: {way}")
    advice = advise(problem, found.placement, way, Horizon(horizon_s, pause_s=0.05, least_gain_s=0.01 * horizon_s))
    return Verdict(found.placement if advice.action == "migrate" else None, f"{advice.action}: {advice.reason}")
