"""Adding and losing devices: replicas copied, time and balance, ours beside fresh plans relabelled to match."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from concertina.planners.assignment import match_placement
from concertina.planners.cost import evaluate
from concertina.planners.migrate import plan_migration
from concertina.planners.migration import Migration, MigrationProblem
from concertina.planners.placement import Placement
from concertina.planners.problem import PlacementProblem
from concertina.planners.replan import Replan, ReplanRules, replan
from concertina.planners.solution import Solution, StoppingRule
from concertina.planners.solve import solve

from .placement_cases import FLEETS, SOME_LAYERS, Case, problem, survivors

BALANCE = 0.98


@dataclass(frozen=True, slots=True)
class Change:
    """From one number of devices to another; ``most`` new replicas per layer, on the mean, is the aim (None: no aim).

    ``slots`` per device, before and after.
    """

    experts: int
    layers: int
    before: int
    after: int
    slots: int
    mixed: bool = False
    most: float | None = None

    @property
    def name(self) -> str:
        fleet = "mixed" if self.mixed else "equal"
        return f"{self.experts}x{self.layers}: {self.before} to {self.after} {fleet}, {self.slots} slots"


def changes(quick: bool) -> list[Change]:
    """The references of the design, then one, two and half of the devices more and less."""
    layers = (2, 2) if quick else (16, 58)
    small, large = layers
    found = [
        Change(64, small, 8, 7, 10, most=8),
        Change(256, large, 32, 36, 10, most=12),
        Change(256, large, 32, 28, 10, most=31),
    ]
    if quick:
        return found
    for experts, count, devices in ((64, small, 8), (256, large, 32)):
        for after in (devices + 1, devices + 2, devices * 3 // 2, devices - 1, devices - 2, devices // 2):
            slots = -(-experts // min(after, devices)) + 2
            planned = count if experts < 256 or after == devices // 2 else SOME_LAYERS
            found += [Change(experts, planned, devices, after, slots, mixed) for mixed in FLEETS]
    return found


def measure(change: Change, limit_s: float) -> list[dict[str, Any]]:
    """Rows for ours, EPLB, and our fresh plan."""
    start = _start(change)
    goal = replace(start, cluster=survivors(change.before, change.after, change.mixed))
    assert goal.current is not None
    lost = int((~goal.held_LED.any(axis=2)).sum())
    rows = []
    for method in ("replan", "eplb_global", "scalable"):
        began_s = time.process_time()
        stop = StoppingRule(limit_s if method == "replan" else limit_s / 3, now=time.process_time)
        answer: Placement | None
        least: float | None
        if method == "replan":
            found = replan(goal, ReplanRules(BALANCE, stop=stop))
            answer = found.placement if isinstance(found, Replan) else None
            least = found.least_bytes / float(goal.model.bytes_LE[0, 0]) if isinstance(found, Replan) else None
        else:
            fresh = solve(replace(goal, current=None), method, stop=stop)
            answer = (
                match_placement(goal.current, fresh.placement, goal.cluster, True)
                if isinstance(fresh, Solution)
                else None
            )
            least = None
        rows.append(_row(change, goal, method, answer, time.process_time() - began_s, lost))
        rows[-1]["least_per_layer"] = None if least is None else round(least / change.layers, 2)
    return rows


def _start(change: Change) -> PlacementProblem:
    """A good placement on the devices before, made with all slots (as EPLB does), in shares that fit the loads."""
    case = Case(change.experts, change.layers, change.before, 0, change.mixed)
    empty = replace(problem(case), slots=change.slots)
    filled = solve(empty, "eplb_global")
    assert isinstance(filled, Solution)
    return replace(empty, current=filled.placement)


def _row(
    change: Change, goal: PlacementProblem, method: str, answer: Placement | None, seconds: float, lost: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"part": "change", "case": change.name, "method": method, "seconds": round(seconds, 2)}
    row |= {"layers": change.layers}
    if answer is None or goal.current is None:
        return row | {"answer": None}
    move = MigrationProblem(goal.cluster, goal.model, goal.current, answer)
    began_s = time.process_time()
    migration = plan_migration(move)
    assert isinstance(migration, Migration)
    times_LD = evaluate(goal, answer).device_LD
    balance_L = times_LD.mean(axis=1) / times_LD.max(axis=1)
    per_layer = np.bincount([m.layer for m in migration.moves], minlength=goal.layers)
    return row | {
        "lost_per_layer": lost / goal.layers,
        "copied_per_layer": float(per_layer.mean()),
        "copied_most": int(per_layer.max()),
        "moved_gb": migration.moved_bytes / 1e9,
        "migration_s": migration.seconds,
        "ordering_s": round(time.process_time() - began_s, 2),
        "balance_worst": round(float(balance_L.min()), 4),
        "aim_copied": change.most,
    }
