"""Whether a better placement is worth reaching: steady gain over a horizon against the price of getting there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .assemble import layout_of, placement_of
from .assignment import match_slots
from .cost import Cost, evaluate
from .fields import fail, finite, positive
from .layout import Layout, flow_of
from .migration import Migration
from .placement import Placement
from .problem import PlacementProblem
from .units import LayerProblem, layer_problems


@dataclass(frozen=True, slots=True)
class Horizon:
    """How long a placement is expected to serve, and what a migration takes from serving.

    Parameters
    ----------
    seconds : float
        Time over which the loads are expected to stay.
    slowdown : float
        Part of the throughput lost while weights move, in [0, 1].
    pause_s : float
        Time without any step, at the switch.
    step_part : float
        Part of a whole step's time that the placement's cost makes up (attention is not in it), in (0, 1].
    least_gain_s : float
        Stay unless at least so many seconds of work are won.
    """

    seconds: float = 600.0
    slowdown: float = 0.1
    pause_s: float = 0.0
    step_part: float = 1.0
    least_gain_s: float = 0.0

    def __post_init__(self) -> None:
        positive("horizon: seconds", self.seconds)
        finite("horizon: slowdown", self.slowdown, 0.0, 1.0)
        finite("horizon: pause_s", self.pause_s)
        finite("horizon: step_part", self.step_part, 0.0, 1.0)
        positive("horizon: step_part", self.step_part)
        finite("horizon: least_gain_s", self.least_gain_s)


@dataclass(frozen=True)
class Advice:
    """Stay or migrate, with the numbers.

    Parameters
    ----------
    action : {"stay", "migrate"}
    reason : str
    stay : Placement or None
        The replicas of now with their tokens split afresh; None where an expert has no replica left.
    stay_step_s, migrate_step_s : float
        Cost of one step, staying and after the migration; infinite where staying cannot serve.
    gain_s : float
        Seconds of work saved over the horizon by faster steps.
    price_s : float
        Seconds of work lost to the migration.
    """

    action: Literal["stay", "migrate"]
    reason: str
    stay: Placement | None
    stay_step_s: float
    migrate_step_s: float
    gain_s: float
    price_s: float


def resplit(problem: PlacementProblem) -> Placement | None:
    """The current replicas on the devices of now, tokens split as well as they allow (eq. 6); moves nothing.

    None where an expert has no replica left.

    Raises
    ------
    OperatorError
        The problem has no current placement.
    """
    if problem.current is None:
        fail("resplit: problem.current", None, "the current placement")
    layers = layer_problems(problem)
    layouts = []
    for layer in layers:
        layout = layout_of(problem, layer, problem.current)
        if layout is None:
            return None
        layouts.append(settled(layer, layout))
    return match_slots(problem.current, placement_of(problem, layers, layouts))


def settled(layer: LayerProblem, layout: Layout) -> Layout:
    """The same replicas, tokens split so that the slowest device is as fast as they allow (eq. 6)."""
    flow = flow_of(layer, layout.unit_R, layout.device_R, layer.tokens_U, layer.base_D)
    flow.settle(range(layer.devices), tolerance_s=1e-7 * max(flow.time), most=100_000)
    return Layout(layout.unit_R, layout.device_R, np.array(flow.amount))


def advise(problem: PlacementProblem, new: Placement, migration: Migration, horizon: Horizon) -> Advice:
    """Weigh ``new``, reached by ``migration``, against staying.

    With steps of s seconds now and n after, a horizon of H seconds and a migration of m: the steps that fit into H - m
    seconds are done ``(H - m) (1 - n/s) part`` seconds sooner, and ``m slowdown + pause`` seconds are lost.
    """
    stay = resplit(problem)
    then_s = _step_s(evaluate(problem, new))
    moved = f"{migration.moved_bytes / 1e9:.3g} GB in {migration.seconds:.3g} s"
    price_s = migration.seconds * horizon.slowdown + horizon.pause_s
    if stay is None:
        reason = f"experts have no replica left: migrating is needed ({moved})"
        return Advice("migrate", reason, None, float("inf"), then_s, float("inf"), price_s)
    now_s = _step_s(evaluate(problem, stay))
    part = (1.0 - then_s / now_s) * horizon.step_part if now_s > 0 else 0.0
    gain_s = max(0.0, horizon.seconds - migration.seconds) * part
    net_s = gain_s - price_s
    numbers = (
        f"steps {100 * part:+.1f} % faster save {gain_s:.3g} s over {horizon.seconds:.4g} s; "
        f"moving {moved} costs {price_s:.3g} s of work"
    )
    if net_s > horizon.least_gain_s:
        return Advice("migrate", numbers, stay, now_s, then_s, gain_s, price_s)
    numbers += f"; net {net_s:.3g} s is not above {horizon.least_gain_s:.3g} s"
    return Advice("stay", numbers, stay, now_s, then_s, gain_s, price_s)


def _step_s(cost: Cost) -> float:
    return cost.total - cost.moves
