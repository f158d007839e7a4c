"""The file that ``concertina plan fleet`` reads, and the document it writes. Format: docs/planning.md."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import OperatorError
from ..planners.fleet import FleetKind, FleetPlan, FleetProblem, Forecast, ServiceTarget
from .document import Node, read_document

_COUNTS = ("running", "min_count", "max_count", "start_periods")
_COSTS = ("start_cost", "stop_cost")


def read_fleet(path: str | Path) -> FleetProblem:
    """A fleet file: length of a period, demand, targets, kinds of devices.

    Raises
    ------
    OperatorError
        With the file, field, value and expectation.
    """
    node = read_document(path)
    fields = node.fields(("period_s", "demand", "targets", "kinds"), ("shortfall_price",))
    demand = dict(fields["demand"].named("demands"))
    resources = tuple(demand)
    kinds = tuple(_kind(name, kind, resources) for name, kind in fields["kinds"].named("device kinds"))
    forecasts = tuple(_forecast(entry) for entry in demand.values())
    targets = tuple(_target(t) for t in fields["targets"].items("a list of targets"))
    price = fields.get("shortfall_price")
    price_s = None if price is None or price.value is None else price.quantity("0.01")
    try:
        return FleetProblem(fields["period_s"].quantity("300"), resources, kinds, forecasts, targets, price_s)
    except OperatorError as e:
        raise OperatorError(f"{node.source}: {e}") from e


def _kind(name: str, node: Node, resources: tuple[str, ...]) -> FleetKind:
    fields = node.fields(("capacity", "price_per_hour"), ("arriving", *_COUNTS, *_COSTS))
    capacity = fields["capacity"].fields(resources)
    more: dict[str, Any] = {c: fields[c].whole() for c in _COUNTS if c in fields}
    more.update({c: fields[c].quantity("0.5") for c in _COSTS if c in fields})
    if "arriving" in fields:
        more["arriving"] = tuple(a.whole() for a in fields["arriving"].items("a list of counts per period", 0))
    price_s = fields["price_per_hour"].quantity("2.5") / 3600.0
    return FleetKind(name, tuple(capacity[r].quantity("12000") for r in resources), price_s, **more)


def _forecast(node: Node) -> Forecast:
    """A list of numbers, known for sure; or quantiles and one row of demands per period."""
    if isinstance(node.value, list):
        return Forecast.certain([d.quantity("1000") for d in node.items("demands per period")])
    fields = node.fields(("quantiles", "periods"))
    quantiles = tuple(q.quantity("0.95") for q in fields["quantiles"].items("a list of quantiles"))
    rows = fields["periods"].items("one list of demands per period")
    return Forecast(quantiles, tuple(tuple(d.quantity("1000") for d in row.items()) for row in rows))


def _target(node: Node) -> ServiceTarget:
    fields = node.fields(("resource",), ("quantile", "max_utilisation"))
    more = {name: fields[name].quantity("0.95") for name in ("quantile", "max_utilisation") if name in fields}
    return ServiceTarget(fields["resource"].text(), **more)


def fleet_to_dict(problem: FleetProblem, plan: FleetPlan) -> dict[str, Any]:
    """A JSON-ready form of the plan."""
    kinds = [
        {"name": kind.name, "serving": serving, "started": started, "stopped": stopped}
        for kind, serving, started, stopped in zip(  # an infeasible plan has no counts
            problem.kinds, plan.serving_KT, plan.started_KT, plan.stopped_KT, strict=bool(plan.serving_KT)
        )
    ]
    return {
        "format": "concertina-fleet/1",
        "status": plan.status,
        "period_s": problem.period_s,
        "kinds": kinds,
        "cost": asdict(plan.cost) | {"total": plan.cost.total} if plan.cost else None,
        "bound": plan.bound,
        "reasons": [asdict(r) for r in plan.reasons],
        "shortages": [asdict(s) for s in plan.shortages],
    }
