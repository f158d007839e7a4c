"""Which device limits which layer of a placement, by how much, and what would relieve it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .assemble import layout_of
from .bounds import case_bound
from .fields import fail
from .layout import Layout, device_time_D, fixed_time_D, flow_of
from .placement import Placement
from .problem import PlacementProblem
from .units import LayerProblem, layer_problems

_NEAR_BOUND = 0.005
_UNITS_TRIED, _DEVICES_TRIED = 4, 4


@dataclass(frozen=True, slots=True)
class LayerLimit:
    """The slowest device of a layer, at the mean loads.

    Parameters
    ----------
    layer : int
    device : str
    time_s, read_s, mean_s, bound_s : float
        Its time and the part of it that does not depend on tokens, the mean over devices, and the time that no
        placement beats.
    hottest : tuple of (int, float)
        Its three busiest experts (of a group, the first) and their part of the device's token work.
    relief : str
        The cheapest thing that would make the layer faster, or why nothing would.
    relieved_s : float
        The layer's time with that; `time_s` if nothing is proposed.
    """

    layer: int
    device: str
    time_s: float
    read_s: float
    mean_s: float
    bound_s: float
    hottest: tuple[tuple[int, float], ...]
    relief: str
    relieved_s: float


def explain(problem: PlacementProblem, placement: Placement) -> tuple[LayerLimit, ...]:
    """The limiting device of every layer and what would relieve it; fractions of a second for a large model.

    Raises
    ------
    OperatorError
        The placement has an expert without a replica on the problem's devices.
    """
    limits = []
    for layer in layer_problems(problem):
        layout = layout_of(problem, layer, placement)
        if layout is None:
            fail(f"explain: layer {layer.layer}", "an expert", "a replica on a device of the cluster")
        limits.append(_limit(problem, layer, layout))
    return tuple(limits)


def _limit(problem: PlacementProblem, layer: LayerProblem, layout: Layout) -> LayerLimit:
    time_D = device_time_D(layer, layout)
    slowest = int(time_D.argmax())
    here_R = np.flatnonzero(layout.device_R == slowest)
    order = here_R[np.argsort(-layout.tokens_R[here_R], kind="stable")]
    total = float(layout.tokens_R[here_R].sum())
    bound_s = case_bound(layer, layer.tokens_U, layer.base_D)
    relief, relieved_s = _relief(problem, layer, layout, slowest, bound_s)
    return LayerLimit(
        layer=layer.layer,
        device=problem.cluster.names[slowest],
        time_s=float(time_D[slowest]),
        read_s=float(fixed_time_D(layer, layout.unit_R, layout.device_R, layer.base_D)[slowest]),
        mean_s=float(time_D.mean()),
        bound_s=bound_s,
        hottest=tuple(
            (layer.members[int(layout.unit_R[r])][0], float(layout.tokens_R[r]) / total if total > 0 else 0.0)
            for r in order[:3].tolist()
        ),
        relief=relief,
        relieved_s=relieved_s,
    )


def _relief(
    problem: PlacementProblem, layer: LayerProblem, layout: Layout, slowest: int, bound_s: float
) -> tuple[str, float]:
    now_s = float(device_time_D(layer, layout).max())
    if bound_s >= now_s * (1 - _NEAR_BOUND):
        return "at the bound: only devices", now_s
    split_s = _settled_s(layer, layout)
    if split_s <= bound_s * (1 + _NEAR_BOUND):
        return "split tokens afresh", split_s
    best_s, best = _best_replica(layer, layout, slowest)
    if best is not None and best_s < split_s * (1 - 1e-4):
        unit, device = best
        return f"expert {layer.members[unit][0]} on {problem.cluster.names[device]} too", best_s
    if split_s < now_s * (1 - _NEAR_BOUND):
        return "split tokens afresh", split_s
    used_D = np.bincount(layout.device_R, weights=layer.width_U[layout.unit_R], minlength=layer.devices)
    if (used_D >= layer.slots_D).all():
        return "a spare slot (none free)", now_s
    return "exchange experts: plan again", now_s


def _settled_s(layer: LayerProblem, layout: Layout) -> float:
    flow = flow_of(layer, layout.unit_R, layout.device_R, layer.tokens_U, layer.base_D)
    flow.settle(range(layer.devices), tolerance_s=1e-7 * max(flow.time), most=20_000)
    return max(flow.time)


def _best_replica(layer: LayerProblem, layout: Layout, slowest: int) -> tuple[float, tuple[int, int] | None]:
    """The additional replica with the best time, of the slowest device's busiest units on the idlest devices."""
    held = set(zip(layout.unit_R.tolist(), layout.device_R.tolist(), strict=True))
    used_D = np.bincount(layout.device_R, weights=layer.width_U[layout.unit_R], minlength=layer.devices)
    here_R = np.flatnonzero(layout.device_R == slowest)
    busiest = layout.unit_R[here_R[np.argsort(-layout.tokens_R[here_R], kind="stable")]][:_UNITS_TRIED].tolist()
    idle_D = np.argsort(device_time_D(layer, layout), kind="stable").tolist()
    best_s, best = np.inf, None
    for unit in busiest:
        open_D = [
            d
            for d in idle_D
            if (unit, d) not in held
            and layer.allowed_UD[unit, d]
            and used_D[d] + layer.width_U[unit] <= layer.slots_D[d]
        ]
        for d in open_D[:_DEVICES_TRIED]:
            more = Layout(
                np.append(layout.unit_R, unit), np.append(layout.device_R, d), np.append(layout.tokens_R, 0.0)
            )
            time_s = _settled_s(layer, more)
            if time_s < best_s:
                best_s, best = time_s, (unit, d)
    return float(best_s), best


def _with(layout: Layout, unit: int, device: int) -> Layout:
    return Layout(np.append(layout.unit_R, unit), np.append(layout.device_R, device), np.append(layout.tokens_R, 0.0))
