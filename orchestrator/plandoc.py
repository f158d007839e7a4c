"""The plan document: a placement file with the problem, the numbers and the migration beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OperatorError
from ..planners.advise import Advice
from ..planners.cluster import Cluster, Device, Links
from ..planners.cost import Cost, evaluate
from ..planners.migration import Migration
from ..planners.model import Loads, ModelSpec
from ..planners.placement import Placement
from ..planners.problem import Objective, PlacementProblem
from .document import Node, read_document

FORMAT = "concertina-plan/1"


@dataclass(frozen=True)
class PlanDocument:
    """A placement, the problem it answers, and how it was found.

    ``before`` is the placement it was planned from, or the simple default where there was none; ``note`` is what
    else its reader should know.
    """

    problem: PlacementProblem
    placement: Placement
    before: Placement | None
    method: str
    reason: str
    bound_s: float
    migration: Migration | None = None
    advice: Advice | None = None
    note: str | None = None

    @property
    def cost(self) -> Cost:
        return evaluate(self.problem, self.placement)


def write_plan(path: str | Path, plan: PlanDocument) -> None:
    """Write the document as JSON; `Placement.from_dict` reads it too.

    Raises
    ------
    OperatorError
        The file cannot be written.
    """
    data: dict[str, Any] = {
        "format": FORMAT,
        "method": plan.method,
        "reason": plan.reason,
        "cost": plan.cost.to_dict(),
        "bound_s": plan.bound_s,
        "note": plan.note,
        **plan.placement.to_dict(),
        "before": plan.before.to_dict() if plan.before else None,
        "problem": problem_to_dict(plan.problem),
    }
    if plan.migration is not None:
        data["migration"] = migration_to_dict(plan.migration)
    if plan.advice is not None:
        advice = {k: v for k, v in asdict(plan.advice).items() if k != "stay"}
        data["advice"] = {k: (None if v == float("inf") else v) for k, v in advice.items()}
    write_json(path, data)


def write_json(path: str | Path, data: dict[str, Any]) -> None:
    """Write one JSON document.

    Raises
    ------
    OperatorError
        The file cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")
    except OSError as e:
        raise OperatorError(f"{path}: cannot be written: {e.strerror}") from e


def migration_to_dict(migration: Migration) -> dict[str, Any]:
    return {
        "moved_bytes": migration.moved_bytes,
        "checkpoint_bytes": migration.checkpoint_bytes,
        "detour_bytes": migration.detour_bytes,
        "seconds": migration.seconds,
        "peak_bytes": migration.peak_bytes,
        "phases": [
            {"seconds": p.seconds, "moves": [asdict(m) for m in p.moves], "frees": [asdict(f) for f in p.frees]}
            for p in migration.phases
        ],
    }


def problem_to_dict(problem: PlacementProblem) -> dict[str, Any]:
    """What `explain` and `compare` need to judge placements again."""
    model = {f: getattr(problem.model, f) for f in ModelSpec.__dataclass_fields__ if f != "expert_bytes"}
    sizes = problem.model.bytes_LE
    model["expert_bytes"] = float(sizes[0, 0]) if (sizes == sizes[0, 0]).all() else sizes.tolist()
    loads = problem.loads
    return {
        "devices": [asdict(d) for d in problem.cluster.devices],
        "links": asdict(problem.cluster.links),
        "model": model,
        "tokens_SLE": loads.tokens_SLE.tolist(),
        "weights_S": loads.scenario_weights_S.tolist(),
        "pairs_PEE": None if loads.pairs_PEE is None else loads.pairs_PEE.tolist(),
        "slots": None if problem.slots is None else np.asarray(problem.slots).tolist(),
        "objective": {"tail": problem.objective.tail, "split": problem.objective.split},
    }


def read_plan(path: str | Path) -> PlanDocument:
    """Read what `write_plan` wrote (its migration and advice are not needed again and left out).

    Raises
    ------
    OperatorError
        The file is no plan, or a field of it is missing or malformed.
    """
    node = read_document(path)
    data = node.value
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        Node(data.get("format") if isinstance(data, dict) else data, node.source, "format").fail(f"{FORMAT!r}")
    try:
        before = Placement.from_dict(data["before"], f"{node.source}: before") if data["before"] else None
        placement = Placement.from_dict(data, node.source)
        problem = _problem(data["problem"], before)
        return PlanDocument(problem, placement, before, data["method"], data["reason"], float(data["bound_s"]))
    except (KeyError, TypeError, ValueError) as e:
        raise OperatorError(f"{node.source}: {e!r}; expected a document as `concertina plan -o` writes it") from e


def _problem(data: dict[str, Any], before: Placement | None) -> PlacementProblem:
    cluster = Cluster(tuple(Device(**d) for d in data["devices"]), Links(**data["links"]))
    loads = Loads(np.array(data["tokens_SLE"]), np.array(data["weights_S"]), data["pairs_PEE"])
    slots = None if data["slots"] is None else np.array(data["slots"])
    objective = Objective(**data["objective"])
    return PlacementProblem(
        cluster, ModelSpec(**data["model"]), loads, slots=slots, current=before, objective=objective
    )
