"""A picture of a plan: load per layer and device, before and after. Needs the optional extra ``plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OperatorError
from ..planners.cost import evaluate
from ..planners.fields import FloatArray
from .plandoc import PlanDocument

_CUT = 2.0
"""Loads are shown up to so many times a layer's mean."""


def plot_plan(path: str | Path, plan: PlanDocument) -> tuple[Path, Path]:
    """Write ``path`` as PNG and as SVG; returns both paths.

    Raises
    ------
    OperatorError
        matplotlib is not installed, or a file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise OperatorError("--plot: matplotlib is not installed; install concertina with the extra 'plot'") from e
    matplotlib.use("Agg")
    figure = _figure(plan)
    stem = Path(path).with_suffix("") if Path(path).suffix in (".png", ".svg") else Path(path)
    files = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    try:
        with matplotlib.rc_context({"svg.hashsalt": "concertina"}):
            figure.savefig(files[0], dpi=160)
            figure.savefig(files[1], metadata={"Date": None})
    except OSError as e:
        raise OperatorError(f"{files[0]}: cannot be written: {e.strerror}") from e
    return files


def _figure(plan: PlanDocument) -> Any:
    from matplotlib.figure import Figure

    parts = [("after", _after(plan))]
    if plan.before is not None and set(plan.before.devices) & set(plan.problem.cluster.names):
        parts.insert(0, ("before", _before(plan)))
    layers, devices = parts[0][1].shape
    width = min(7.5, max(3.6, 0.16 * devices + 1.5)) * len(parts) + 2.6
    figure = Figure(figsize=(width, min(9.0, max(3.2, 0.13 * layers + 1.9))), layout="constrained")
    ratios = [*[4.0] * len(parts), 1.7]
    axes = figure.subplots(1, len(parts) + 1, width_ratios=ratios, sharey=True)
    names = plan.problem.cluster.names
    images = [_heat(axis, name, load_LD, names) for axis, (name, load_LD) in zip(axes, parts, strict=False)]
    axes[0].set_ylabel("MoE layer")
    colour = figure.colorbar(images[-1], ax=list(axes[:-1]), shrink=0.9, pad=0.02, aspect=30, extend="max")
    colour.set_label("device time / mean of the layer")
    _balance(axes[-1], parts)
    figure.suptitle(_title(plan), fontsize=10, x=0.01, ha="left")
    return figure


def _after(plan: PlanDocument) -> FloatArray:
    """Device times over the layer's mean, shape (L, D)."""
    return _relative(evaluate(plan.problem, plan.placement).device_LD)


def _before(plan: PlanDocument) -> FloatArray:
    """The same for what is left of the old placement: others take over the shares of replicas that are gone."""
    problem, before, here = plan.problem, plan.before, plan.problem.cluster.index
    assert before is not None
    time_LD = np.zeros((problem.layers, problem.devices))
    token_s_D = problem.model.flops_per_token / problem.cluster.flops_D
    for layer, experts in enumerate(before.replicas_LE):
        for e, replicas in enumerate(experts):
            left = [(here[before.devices[r.device]], r.share) for r in replicas if before.devices[r.device] in here]
            total = sum(share for _, share in left)
            for d, share in left:
                work_s = problem.loads.mean_LE[layer, e] * share / total * token_s_D[d]
                read_s = problem.model.bytes_LE[layer, e] / problem.cluster.bandwidth_bytes_s_D[d]
                time_LD[layer, d] += work_s + read_s
    return _relative(time_LD)


def _relative(time_LD: FloatArray) -> FloatArray:
    relative: FloatArray = time_LD / np.maximum(time_LD.mean(axis=1, keepdims=True), 1e-300)
    return relative


def _heat(axis: Any, name: str, load_LD: FloatArray, names: tuple[str, ...]) -> Any:
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=_CUT)
    image = axis.imshow(load_LD, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    slowest = float(load_LD.max(axis=1).mean())
    axis.set_title(f"{name}: slowest device {slowest:.2f} x mean", fontsize=9, loc="left")
    every = max(1, -(-len(names) // 16))
    axis.set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=7)
    step = max(1, -(-len(load_LD) // 15))
    axis.set_yticks(range(0, len(load_LD), step))
    axis.tick_params(length=2, labelsize=7)
    return image


def _balance(axis: Any, parts: list[tuple[str, FloatArray]]) -> None:
    """Mean over maximum per layer: 1 is perfect."""
    colours = {"before": "#b2182b", "after": "#2166ac"}
    for name, load_LD in parts:
        balance_L = 1.0 / np.maximum(load_LD.max(axis=1), 1e-300)
        layers = np.arange(len(balance_L))
        axis.plot(balance_L, layers, color=colours[name], marker="o", ms=2.5, lw=0.8, label=name)
    axis.set_xlim(0, 1.04)
    axis.axvline(1.0, color="0.7", lw=0.6)
    axis.set_title("balance (mean / max)", fontsize=9, loc="left")
    axis.tick_params(labelsize=7, length=2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="lower left")


def _title(plan: PlanDocument) -> str:
    problem = plan.problem
    text = f"{problem.layers} layers x {problem.experts} experts on {problem.devices} devices, {plan.method}"
    if plan.migration is not None:
        text += f"; {plan.migration.moved_bytes / 1e9:.3g} GB moved"
    return text
