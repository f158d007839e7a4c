"""The planners at work for a deployment: where experts go first, and whether to move them later. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf

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

_TIME_LIMIT_S = 2.0
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Site:
    """What a placement is for.

    Parameters
    ----------
    seats : sequence of Seat
    model : ModelSpec
    spare_slots : int
        Physical experts per layer beyond one of each, at least.
    room : float
        Experts of one layer that fit a device of the largest kind; others hold a part of it.
    kv_room : float
        The same for the KV cache that every device must have beside them.
    """

    seats: Sequence[Seat]
    model: ModelSpec
    spare_slots: int = 0
    room: float = inf
    kv_room: float = 0.0

    @property
    def slots_D(self) -> tuple[int, ...]:
        """Most physical experts of a layer on each device: in proportion to its speed, as far as they fit it."""
        most_D = [self.room * seat.kind.memory_part - self.kv_room for seat in self.seats]
        slots_D, left = [0] * len(self.seats), self.model.experts + self.spare_slots
        free = {d for d, most in enumerate(most_D) if most >= 1}
        while left > 0 and free:
            speed = sum(self.seats[d].kind.flops for d in free)
            wanted = {d: slots_D[d] + ceil(left * self.seats[d].kind.flops / speed - _ROUNDING) for d in free}
            for d in free:
                slots_D[d] = int(min(wanted[d], most_D[d]))
            left = self.model.experts + self.spare_slots - sum(slots_D)
            free = {d for d in free if slots_D[d] + 1 <= most_D[d]}
        return tuple(slots_D)

    def cluster(self) -> Cluster:
        layer_bytes = float(self.model.bytes_LE.max())
        return Cluster(
            tuple(
                Device(
                    seat.device,
                    seat.kind.name,
                    int((layer_bytes * slots + self.model.shared_bytes) * self.model.layers) + 1,
                    seat.kind.flops,
                    seat.kind.bandwidth_bytes_s,
                    seat.node,
                )
                for seat, slots in zip(self.seats, self.slots_D, strict=True)
            )
        )

    def problem(self, loads: Loads, current: Placement | None = None) -> PlacementProblem:
        return PlacementProblem(self.cluster(), self.model, loads, slots=np.array(self.slots_D), current=current)


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
    way = plan_migration(MigrationProblem(_roomy(problem.cluster, site.model), site.model, current, found.placement))
    if isinstance(way, Infeasible):
        return Verdict(None, f"stay: {way}")
    advice = advise(problem, found.placement, way, Horizon(horizon_s, pause_s=0.05, least_gain_s=0.01 * horizon_s))
    return Verdict(found.placement if advice.action == "migrate" else None, f"{advice.action}: {advice.reason}")


def _roomy(cluster: Cluster, model: ModelSpec) -> Cluster:
    """Devices whose memory holds every expert: a site's holds as many as shall be there, and old and new ones together
    are there on the way. Whether they fit, or what has to yield, is not decided here."""
    everything = ceil(float(model.bytes_LE.sum()) + model.shared_bytes * model.layers)
    return replace(cluster, devices=tuple(replace(device, memory_bytes=everything) for device in cluster.devices))
