"""What certainly does not fit: necessary conditions, checked before any solver starts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .solution import Lack
from .units import LayerProblem


def lacks(layer: LayerProblem) -> list[Lack]:
    """Every necessary condition that this layer breaks; an empty list proves nothing."""
    return [*_totals(layer), *_rules(layer), *_pins(layer)]


def _totals(layer: LayerProblem) -> Iterator[Lack]:
    where = f"layer {layer.layer}"
    least_U = np.maximum(layer.pinned_UD.sum(axis=1), layer.min_nodes)
    slots, need_slots = int(layer.slots_D.sum()), int(least_U @ layer.width_U)
    if need_slots > slots:
        yield Lack(f"{where}: replicas on all devices", need_slots, slots, "slots")
    room, need_bytes = float(layer.budget_D.sum()), float(least_U @ layer.bytes_U)
    if need_bytes > room:
        yield Lack(f"{where}: weights on all devices", need_bytes, room, "bytes")


def _rules(layer: LayerProblem) -> Iterator[Lack]:
    where = f"layer {layer.layer}"
    if layer.min_nodes > layer.node_count:
        yield Lack(f"{where}: min_nodes", layer.min_nodes, layer.node_count, "nodes")
        return
    fits_UD = layer.allowed_UD & (layer.width_U[:, None] <= layer.slots_D)
    fits_UD &= layer.bytes_U[:, None] <= layer.budget_D
    for u in range(layer.units):
        nodes = len(np.unique(layer.node_D[fits_UD[u]]))
        if nodes < layer.min_nodes:
            what = f"{where}: experts {list(layer.members[u])}: nodes that may and can hold them"
            yield Lack(what, layer.min_nodes, nodes, "nodes")


def _pins(layer: LayerProblem) -> Iterator[Lack]:
    where = f"layer {layer.layer}"
    for u, d in zip(*np.nonzero(layer.pinned_UD & ~layer.allowed_UD), strict=True):
        yield Lack(f"{where}: experts {list(layer.members[u])}: pinned to and forbidden on device {d}", 1, 0, "devices")
    pinned_D = layer.width_U @ layer.pinned_UD
    bytes_D = layer.bytes_U @ layer.pinned_UD
    for d in np.flatnonzero(pinned_D > layer.slots_D):
        yield Lack(f"{where}: device {d}: pinned replicas", float(pinned_D[d]), float(layer.slots_D[d]), "slots")
    for d in np.flatnonzero(bytes_D > layer.budget_D):
        yield Lack(f"{where}: device {d}: pinned weights", float(bytes_D[d]), float(layer.budget_D[d]), "bytes")
