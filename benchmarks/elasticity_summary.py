"""Medians over repeats under flat names, and the ratios that the aims name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Row = Mapping[str, Any]
_MIB = 1 << 20
_CHANGE = {
    "dry_run_s": "dry_run_s",
    "plan_s": "plan_s",
    "commit_s": "commit_s",
    "end_s": "end_s",
    "first_step_s": "first_step_s",
    "standby_again_s": "standby_again_s",
    "step_ms": "median_step_ms",
    "later_step_ms": "median_step_afterwards_ms",
    "pause_ms": "pause_ms",
    "pause_steps": "pause_steps",
    "control_pause_steps": "pause_without_change_steps",
    "standby_pause_steps": "pause_as_the_next_standby_starts_steps",
    "client_silence_ms": "client_silence_ms",
    "tokens_per_s_before": "tokens_per_s_before",
    "tokens_per_s_during": "tokens_per_s_during",
    "tokens_per_s_after": "tokens_per_s_after",
    "tokens_per_s_standby_starting": "tokens_per_s_while_a_standby_starts",
    "throughput_during_over_before": "throughput_during_over_before_ratio",
    "throughput_during_over_expected": "throughput_during_over_expected_ratio",
    "throughput_until_commit_over_before": "throughput_until_commit_over_before_ratio",
    "throughput_from_commit_over_after": "throughput_from_commit_over_after_ratio",
    "lost_ms": "serving_lost_ms",
    "standby_lost_ms": "serving_lost_as_the_next_standby_starts_ms",
    "peak_over_steady": "peak_over_steady_ratio",
    "pool_peak_over_steady": "pool_peak_over_steady_ratio",
}
_OTHER_WAYS = {
    "serving_s": "serving_s",
    "end_s": "end_s",
    "peak_over_steady": "peak_over_steady_ratio",
    "throughput_during_over_before": "throughput_during_over_before_ratio",
}
_WAYS = ("serve_restart", "cold_restart", "second_copy")
_KILLED = {"silence_s": "silence_s", "control_silence_s": "silence_without_kill_s", "whole_again_s": "whole_again_s"}


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """One number per measure, change, memory mode and checkpoint."""
    groups: dict[tuple[str, str], list[Row]] = {}
    streams: Counter[str] = Counter()
    for row in rows:
        if row["case"] == "streams":
            # Rounded to fewer bits, a token depends on what else is in its batch, also where nothing changes.
            for count in ("finished", "failed", "changed") if row["dtype"] == "float32" else ("finished", "failed"):
                streams[f"streams_{count}_{row['checkpoint']}"] += row.get(count, 0)
        else:
            groups.setdefault((row["case"], f"{row['change']}_{row['mode']}_{row['checkpoint']}"), []).append(row)
    out: dict[str, float] = {}
    for (case, label), some in groups.items():
        out |= _group(case, label, some)
    return out | _speedups(out) | streams


def _group(case: str, label: str, rows: Sequence[Row]) -> dict[str, float]:
    if case == "change":
        return _medians("", label, _CHANGE, rows) | _bytes(label, rows)
    if case == "bare_copy":
        return _medians("bare_", label, {"copy_s": "copy_s"}, rows)
    if case in _WAYS:
        return _medians(f"{case}_", label, _OTHER_WAYS, rows)
    return _medians(f"{'recovery' if case == 'killed_worker' else case}_", label, _KILLED, rows)


def _medians(prefix: str, label: str, names: Mapping[str, str], rows: Sequence[Row]) -> dict[str, float]:
    there = {key: name for key, name in names.items() if key in rows[0]}
    return {f"{prefix}{name}_{label}": round(median(row[key] for row in rows), 4) for key, name in there.items()}


def _bytes(label: str, rows: Sequence[Row]) -> dict[str, float]:
    out = {
        f"{name}_mib_{label}": round(median(row[f"{name}_bytes"] for row in rows) / _MIB, 3)
        for name in ("copied", "loaded", "dry_run", "planned", "kv_copied")
    }
    moving = [row for row in rows if row["planned_bytes"]]
    if moving:
        for name in ("copied", "dry_run"):
            ratios = [row[f"{name}_bytes"] / row["planned_bytes"] for row in moving]
            out[f"{name}_over_planned_ratio_{label}"] = round(median(ratios), 4)
            out[f"{name}_over_planned_at_most_ratio_{label}"] = round(max(ratios), 4)
        for part in ("", "pool_"):
            more = [(row[f"{part}peak_bytes"] - row[f"{part}steady_bytes"]) / row["planned_bytes"] for row in moving]
            out[f"{part}peak_less_steady_over_planned_ratio_{label}"] = round(median(more), 4)
            out[f"{part}peak_less_steady_over_planned_at_most_ratio_{label}"] = round(max(more), 4)
    return out


def _speedups(figures: Mapping[str, float]) -> dict[str, float]:
    """How many times sooner our commit comes than the other ways serve, and later than the bytes could be there.

    The other ways end with a token, a commit at a boundary: so also from request to the end of our first step.
    """
    out = {}
    for key, commit_s in figures.items():
        label = key.removeprefix("commit_s_")
        step_s = figures.get(f"first_step_s_{label}", commit_s)
        for way in _WAYS:
            other_s = figures.get(f"{way}_serving_s_{label}")
            if label != key and other_s is not None:
                out[f"{way}_over_commit_ratio_{label}"] = round(other_s / commit_s, 1)
                out[f"{way}_over_first_step_ratio_{label}"] = round(other_s / step_s, 1)
        copy_s = figures.get(f"bare_copy_s_{label}")
        if label != key and copy_s:
            out[f"commit_over_bare_copy_ratio_{label}"] = round(commit_s / copy_s, 2)
    return out
