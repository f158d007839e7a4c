"""The picture of a timeline: phases, requests, throughput, pages by purpose. Needs the optional extra ``plot``."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .elasticity_timeline import Timeline

_LEAST_BIN_S = 0.05
_BIN_STEPS = 2.5
_MIB = 1 << 20
_INK, _FAINT = "#222222", "#9a9a9a"
# Before the commit in warm colours, behind it in a cold one.
_PHASES = ("#fde3c8", "#fbc48f", "#f5a25d", "#e67e3c")
_CLEARING = "#9ec4e3"
# Not the pools' own books (table, ledger): they never change, and most of their pages are never touched.
_PAGES = {
    "experts": "#4c78a8",
    "kv": "#72b7b2",
    "trunk": "#9d97c5",
    "exchange": "#e5ae38",
}
_NAMES = {"kv": "KV cache"}
_DEVICES = ("#4c78a8", "#f58518", "#72b7b2", "#b279a2")


def plot(stem: Path, timeline: Timeline) -> tuple[Path, Path]:
    """Write ``stem`` as PNG and as SVG; returns both paths."""
    import matplotlib

    matplotlib.use("Agg")
    files = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "concertina", "font.size": 9, "axes.edgecolor": _FAINT}):
        figure = _figure(timeline)
        figure.savefig(files[0], dpi=160)
        figure.savefig(files[1], metadata={"Date": None})
    return files


def _figure(timeline: Timeline) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(0.45, 0.8, 1.5, 1.7))
    for axis, draw in zip(axes, (_phases, _requests, _throughput, _pages), strict=True):
        draw(axis, timeline)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(length=2, color=_FAINT, labelsize=8)
        for at_s, style in ((0.0, "-"), (timeline.committed_s, "--"), (timeline.ended_s, ":")):
            axis.axvline(at_s, color=_INK, lw=0.8, ls=style, zorder=5)
    looks = (timeline.pages, timeline.running)
    axes[-1].set_xlim(max(seen[0][0] for seen in looks), min(seen[-1][0] for seen in looks))
    axes[-1].set_xlabel("seconds since the request")
    figure.suptitle(f"{timeline.title}\n ", fontsize=11, x=0.01, ha="left")
    return figure


def _phases(axis: Any, timeline: Timeline) -> None:
    """Bars of the phases; their names are in the legend, because some phases are too short for words."""
    starts = [*timeline.phases, (timeline.ended_s, "")]
    colours = iter(_PHASES)
    for (begin_s, words), (end_s, _) in pairwise(starts):
        colour = _CLEARING if words == "clearing up" else next(colours, _PHASES[-1])
        label = f"{words} ({end_s - begin_s:.2f} s)"
        axis.broken_barh([(begin_s, end_s - begin_s)], (0, 1), facecolors=colour, label=label, lw=0)
    axis.set_yticks([])
    axis.set_ylim(0, 1.7)
    axis.spines["left"].set_visible(False)
    _legend(axis)
    marks = ((0.0, "request ", "right"), (timeline.committed_s, "commit ", "right"), (timeline.ended_s, " end", "left"))
    for at_s, words, side in marks:
        axis.text(at_s, 1.15, words, ha=side, fontsize=8, color=_INK)


def _requests(axis: Any, timeline: Timeline) -> None:
    at_s = [at for at, _ in timeline.running]
    devices = sorted({device for _, running in timeline.running for device in running})
    counts = [[running.get(device, 0) for _, running in timeline.running] for device in devices]
    axis.stackplot(at_s, *counts, labels=devices, colors=_DEVICES, step="post", lw=0, alpha=0.75)
    axis.set_ylim(0, 1.1 * max(map(sum, zip(*counts, strict=True))))
    _title(axis, "requests running")
    _legend(axis)


def _throughput(axis: Any, timeline: Timeline) -> None:
    bin_s = max(_LEAST_BIN_S, _BIN_STEPS * timeline.step_s)
    edges = np.arange(np.floor(timeline.begin_s / bin_s), np.ceil(timeline.end_s / bin_s)) * bin_s
    at_s, tokens = np.asarray(timeline.arrivals).T
    per_s, _ = np.histogram(at_s, edges, weights=tokens / bin_s)
    axis.stairs(per_s, edges, fill=True, color="#c9d6e4")
    axis.stairs(per_s, edges, color="#4c78a8", lw=0.8)
    axis.set_ylim(0, None)
    _title(axis, f"tokens/s, in bins of {bin_s * 1e3:.0f} ms")


def _pages(axis: Any, timeline: Timeline) -> None:
    at_s = [at for at, _ in timeline.pages]
    seen = {purpose: [pages.get(purpose, 0) / _MIB for _, pages in timeline.pages] for purpose in _PAGES}
    shown = {purpose: mib for purpose, mib in seen.items() if max(mib) > 0}
    labels = [_NAMES.get(purpose, purpose) for purpose in shown]
    colours = [_PAGES[purpose] for purpose in shown]
    axis.stackplot(at_s, *shown.values(), labels=labels, colors=colours, step="post", lw=0)
    axis.set_ylim(0, 1.1 * max(map(sum, zip(*shown.values(), strict=True))))
    _title(axis, "pages given out, MiB")
    _legend(axis)


def _title(axis: Any, words: str) -> None:
    axis.set_title(words, fontsize=9, loc="left", color=_INK)


def _legend(axis: Any) -> None:
    """On the right above the panel, where no line crosses it."""
    box: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.97), "borderpad": 0.1, "borderaxespad": 0.0}
    legend = axis.legend(fontsize=8, frameon=False, ncols=6, handlelength=1.0, columnspacing=1.2, **box)
    legend.set_in_layout(False)  # wider than what is left beside the labels: it must not squeeze the panels
