"""Placement plans beside published baselines: gap to the bound, time, bytes moved on changes, held-out balance.

``python -m benchmarks.placement [--json FILE] [--quick]``. Loads are generated (log-normal), and real OLMoE routing
where ``../shared/data`` has it. Every plan is checked before it is reported. Seconds are CPU time of one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from itertools import product
from typing import Any

from concertina.planners.check import check_placement
from concertina.planners.solution import Solution, StoppingRule
from concertina.planners.solve import solve

from .common import write_report
from .placement_cases import Case, cases, made_up_domains, problem, routing
from .placement_change import changes, measure
from .placement_honesty import gains, halves, leave_one_out
from .placement_split import split_rows

BASELINES = ("round_robin", "greedy", "eplb_global", "eplb_hierarchical")
PARTS = ("fresh", "change", "split", "honesty")
SMALL = 0.5
"""Least part of a layer's time limit that a layer of fewer experts gets."""
Row = dict[str, Any]


def fresh(case: Case, limit_s: float) -> Row:
    """Ours and every baseline on one instance."""
    instance = problem(case)
    began_s = time.process_time()
    ours = solve(instance, "scalable", stop=StoppingRule(limit_s, gap=5e-4, now=time.process_time))
    seconds = time.process_time() - began_s
    assert isinstance(ours, Solution), ours
    wrong = check_placement(instance, ours.placement)
    assert not wrong, wrong
    row: Row = {"part": "fresh", "case": case.name, "experts": case.experts, "layers": case.layers}
    row |= {
        "devices": case.devices,
        "mixed": case.mixed,
        "decode": case.tokens < 256,
        "seconds": round(seconds, 2),
        "stopped": ours.reason,
    }
    row |= {"cost_s": ours.cost.total, "gap": ours.gap}
    for name in BASELINES:
        found = solve(instance, name)
        row[name] = found.cost.total / ours.cost.total if isinstance(found, Solution) else None
    return row


def show(rows: Iterable[Row], columns: tuple[str, ...]) -> None:
    """Rows as a table of text."""
    for row in rows:
        cells = []
        for name in columns:
            value = row.get(name)
            cells.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        print("  ".join(cells), flush=True)


def aims(rows: list[Row], quick: bool) -> list[Row]:
    """Whether each aim is met, with the worst value seen."""
    answers = _plan_aims([r for r in rows if r["part"] == "fresh"], quick)
    answers += _change_aims([r for r in rows if r["part"] == "change" and r["method"] == "replan"], quick)
    answers += _split_aims([r for r in rows if r["part"] == "split"])
    return answers + _honesty_aims(rows)


def _plan_aims(plans: list[Row], quick: bool) -> list[Row]:
    if not plans:
        return []
    large = [r for r in plans if r["experts"] == 256 and r["devices"] >= 32]
    ratios = [r[b] for r in plans for b in BASELINES if r[b] is not None]
    answers = [aim("no baseline is better (baseline / ours, least)", min(ratios), 1 - 1e-6, above=True)]
    for regime, (fleet, most) in product(("prefill", "decode"), (("equal", 0.002), ("mixed", 0.01))):
        gaps = [r["gap"] for r in large if (r["decode"], r["mixed"]) == (regime == "decode", fleet == "mixed")]
        if gaps:
            answers.append(aim(f"256 experts, {regime}, {fleet}: gap, most", max(gaps), most))
    if not quick:
        answers.append(
            aim("256 x 58: seconds for all layers, most", max(r["seconds"] for r in large if r["layers"] == 58), 10.0)
        )
    robin = [1 - 1 / r["round_robin"] for r in plans if r["mixed"] and r["round_robin"] is not None]
    answers.append(aim("mixed: step cost below count-balanced, least", min(robin), 0.15, above=True))
    return answers


def aim(what: str, value: float, limit: float, above: bool = False) -> Row:
    met = value >= limit if above else value <= limit
    return {"aim": what, "value": float(value), "limit": limit, "met": bool(met)}


def _change_aims(rows: list[Row], quick: bool) -> list[Row]:
    answers = []
    for r in rows:
        if r.get("aim_copied") is not None:
            limit = max(r["aim_copied"], r["lost_per_layer"])
            answers.append(aim(f"{r['case']}: replicas copied per layer", r["copied_per_layer"], limit))
            answers.append(aim(f"{r['case']}: worst balance", r["balance_worst"], 0.98 - 1e-3, above=True))
    if rows and not quick:
        answers.append(
            aim("re-plans: seconds for all layers", max(r["seconds"] for r in rows if r["layers"] == 58), 30.0)
        )
    return answers


def _split_aims(rows: list[Row]) -> list[Row]:
    kinds = sorted({r["replicas"] for r in rows})
    most = {kind: max(r["ms_most"] for r in rows if r["replicas"] == kind) for kind in kinds}
    return [aim(f"split per batch, {kind}: ms, most", most[kind], 1.0) for kind in kinds]


def _honesty_aims(rows: list[Row]) -> list[Row]:
    """Held-out domains; for the second half of a trace no aim is stated, and `gains` shows the room and its use."""
    answers = []
    for row in gains([r for r in rows if r["part"] == "honesty"]):
        if row["of"] != "least of one layer":
            name = f"held out, {row['devices']} devices: {row['of']} above EPLB by"
            answers.append(aim(name, row["gain"], 0.15, above=True) | {"attainable": row["attainable"]})
    return answers


def honesty(quick: bool) -> tuple[str, list[Row]]:
    """Where the routing comes from, and the held-out scores."""
    domains = routing("olmoe")
    rows: list[Row] = []
    for devices in (8, 16):
        stop = StoppingRule(1.0 if quick else 5.0, now=time.process_time)
        rows += leave_one_out(domains or made_up_domains(), devices, 32, stop)
        rows += halves(domains or made_up_domains(), devices, 32, stop)
    return "OLMoE (allenai, real)" if domains else "made up (no ../shared/data)", rows


def _share(experts: int, layers: int, least: float = 0.1) -> float:
    """Part of the time limits, which are stated for 58 layers of 256 experts; a layer of few has its fixed costs."""
    return max(experts / 256.0, least) * layers / 58.0


def run(parts: tuple[str, ...], quick: bool) -> tuple[str, list[Row]]:
    """Every part, shown as it is measured; returns the routing's source and all rows."""
    rows: list[Row] = []
    for case in cases(quick) if "fresh" in parts else ():
        rows.append(fresh(case, 2.0 if quick else 9.4 * _share(case.experts, case.layers, SMALL)))
        show(rows[-1:], ("case", "gap", "seconds", *BASELINES))
    for change in changes(quick) if "change" in parts else ():
        found = measure(change, 8.0 if quick else 26.0 * _share(change.experts, change.layers))
        rows += found
        columns = ("case", "method", "copied_per_layer", "lost_per_layer", "least_per_layer", "balance_worst")
        show(found, (*columns, "moved_gb", "migration_s", "seconds"))
    if "split" in parts:
        found = split_rows(quick)
        rows += found
        show(found, ("replicas", "mixed", "drift", "ms_mean", "ms_most", "above_lp_mean", "above_lp_most"))
    source = "none"
    if "honesty" in parts:
        source, found = honesty(quick)
        rows += found
        show(
            found,
            ("devices", "held_out", "method", "fixed_mean", "fixed_worst", "split_mean", "split_worst", "single_worst"),
        )
    return source, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the report here")
    parser.add_argument("--quick", action="store_true", help="a few small instances, under a minute")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part (may be repeated)")
    given = parser.parse_args()
    source, rows = run(tuple(given.part or PARTS), given.quick)
    answers = aims(rows, given.quick)
    print(f"\nrouting: {source}")
    for answer in answers:
        met = "met    " if answer["met"] else "NOT MET"
        known = f", knowing what is held out {answer['attainable']:.4g}" if "attainable" in answer else ""
        print(f"{met} {answer['aim']}: {answer['value']:.4g} (limit {answer['limit']:g}{known})")
    gained = gains([r for r in rows if r["part"] in ("honesty", "halves")])
    show(gained, ("part", "devices", "of", "eplb", "ours", "gain", "room", "taken", "attainable"))
    summary = {"quick": given.quick, "routing": source, "met": sum(a["met"] for a in answers), "aims": answers}
    summary["gains"] = gained
    write_report(given.json, "placement", summary, rows)


if __name__ == "__main__":
    main()
