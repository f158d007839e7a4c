"""From layouts to a placement, and from a placement to layouts."""

from __future__ import annotations

import numpy as np

from .layout import Layout
from .placement import Placement, Replica
from .problem import PlacementProblem
from .units import LayerProblem

LEAST_SHARE = 1e-9
"""Share of a replica that must exist but serves no tokens: `Replica.share` is above 0."""


def without_idle(layer: LayerProblem, layout: Layout) -> Layout:
    """Drop replicas that serve nothing, unless a rule wants them: they would only be read."""
    keep_R = layout.tokens_R > LEAST_SHARE * layer.tokens_U[layout.unit_R]
    keep_R |= layer.pinned_UD[layout.unit_R, layout.device_R]
    if layer.min_nodes > 1:
        keep_R[:] = True
    alive_U = np.bincount(layout.unit_R[keep_R], minlength=layer.units) > 0
    first_R = np.zeros(len(keep_R), dtype=np.bool_)
    first_R[np.unique(layout.unit_R, return_index=True)[1]] = True
    keep_R |= first_R & ~alive_U[layout.unit_R]
    return Layout(layout.unit_R[keep_R], layout.device_R[keep_R], layout.tokens_R[keep_R])


def shares_R(layer: LayerProblem, layout: Layout) -> list[float]:
    """Share of every replica; equal where a unit has no tokens."""
    count_U = np.bincount(layout.unit_R, minlength=layer.units)
    total_U = np.bincount(layout.unit_R, weights=layout.tokens_R, minlength=layer.units)
    total_R = total_U[layout.unit_R]
    even_R = 1.0 / count_U[layout.unit_R]
    part_R = np.where(total_R > 0, layout.tokens_R / np.where(total_R > 0, total_R, 1.0), even_R)
    part_R = np.maximum(part_R, LEAST_SHARE)
    sum_U = np.bincount(layout.unit_R, weights=part_R, minlength=layer.units)
    shares: list[float] = np.minimum(part_R / sum_U[layout.unit_R], 1.0).tolist()
    return shares


def placement_of(problem: PlacementProblem, layers: list[LayerProblem], layouts: list[Layout]) -> Placement:
    """The placement that the layouts describe; slots are dense, in expert order."""
    plan = []
    for layer, layout in zip(layers, (lay.sorted() for lay in layouts), strict=True):
        replicas: list[list[tuple[int, float]]] = [[] for _ in range(problem.experts)]
        units, devices = layout.unit_R.tolist(), layout.device_R.tolist()
        for u, d, share in zip(units, devices, shares_R(layer, layout), strict=True):
            for e in layer.members[u]:
                replicas[e].append((d, share))
        used = [0] * problem.devices
        experts = []
        for on in replicas:
            row = []
            for d, share in on:
                row.append(Replica(d, used[d], share))
                used[d] += 1
            experts.append(tuple(row))
        plan.append(tuple(experts))
    return Placement(problem.cluster.names, tuple(plan))


def layout_of(problem: PlacementProblem, layer: LayerProblem, placement: Placement) -> Layout | None:
    """A layer of a placement as a layout, without replicas on devices that are gone; None if a unit has none left."""
    here = [problem.cluster.index.get(name, -1) for name in placement.devices]
    unit, device, tokens = [], [], []
    for u, members in enumerate(layer.members):
        kept = [
            (here[r.device], r.share) for r in placement.replicas_LE[layer.layer][members[0]] if here[r.device] >= 0
        ]
        if not kept:
            return None
        total = sum(share for _, share in kept)
        for d, share in kept:
            unit.append(u)
            device.append(d)
            tokens.append(float(layer.tokens_U[u]) * share / total)
    return Layout(np.array(unit), np.array(device), np.array(tokens))
