"""First layouts: how many replicas every unit gets, and a longest-first assignment that knows the slots."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .fields import FloatArray, IntArray
from .layout import Layout
from .units import LayerProblem


def replica_limits(layer: LayerProblem) -> tuple[IntArray, IntArray]:
    """Least and most replicas of every unit, by the rules."""
    least_U = np.maximum(layer.pinned_UD.sum(axis=1), layer.min_nodes)
    roomy_UD = layer.allowed_UD & (layer.width_U[:, None] <= layer.slots_D)
    return least_U.astype(np.int64), np.maximum(roomy_UD.sum(axis=1), least_U).astype(np.int64)


def water_filled(layer: LayerProblem, weight_U: FloatArray | None = None) -> Iterator[IntArray]:
    """Replica counts that grow by one replica at a time, always of the unit with most tokens per replica.

    The first counts are the least that the rules allow; ends when slots or units are used up. ``weight_U`` stands in
    for the mean tokens where given.
    """
    tokens = (layer.tokens_U if weight_U is None else weight_U).tolist()
    least_U, most_U = replica_limits(layer)
    count = least_U.tolist()
    free = int(layer.slots_D.sum()) - int(least_U @ layer.width_U)
    heap = [(-t / c, u) for u, (t, c) in enumerate(zip(tokens, count, strict=True))]
    heapq.heapify(heap)
    yield np.array(count, dtype=np.int64)
    while heap:
        _, u = heapq.heappop(heap)
        if count[u] >= most_U[u] or layer.width_U[u] > free:
            continue
        count[u] += 1
        free -= int(layer.width_U[u])
        heapq.heappush(heap, (-tokens[u] / count[u], u))
        yield np.array(count, dtype=np.int64)


def quotas(layer: LayerProblem, slots: int, token_share: float) -> IntArray:
    """Slots that every device should fill, ``slots`` in all, so that average replicas finish together."""
    slot_s_D = layer.read_UD.mean(axis=0) + layer.token_s_D * token_share
    left = layer.slots_D.tolist()
    heap = [(layer.base_D[d] + slot_s_D[d], d) for d in range(layer.devices) if left[d] > 0]
    heapq.heapify(heap)
    quota = np.zeros(layer.devices, dtype=np.int64)
    for _ in range(slots):
        time, d = heapq.heappop(heap)
        quota[d] += 1
        left[d] -= 1
        if left[d] > 0:
            heapq.heappush(heap, (time + slot_s_D[d], d))
    return quota


@dataclass(frozen=True, slots=True)
class Greed:
    """How longest-first looks ahead.

    Parameters
    ----------
    filler : float
        A free slot within the quota counts as a replica with this many times the mean tokens of the smaller half.
    by_quota : bool
        Keep to `quotas`; otherwise to the slots alone, with no look-ahead.
    piece : float
        Cut units into pieces of this many tokens and a remainder, where that takes their replicas exactly; into equal
        pieces otherwise.
    """

    filler: float = 0.0
    by_quota: bool = True
    piece: float = 0.0


class _Filling:
    """Devices while replicas are put on them one by one."""

    def __init__(self, layer: LayerProblem, quota_D: IntArray, filler_s_D: FloatArray) -> None:
        self.layer = layer
        self.left_D = quota_D.copy()
        self.bytes_D = layer.budget_D.copy()
        self.filler_s_D = filler_s_D
        self.key_D = layer.base_D + quota_D * filler_s_D
        self.open_UD = layer.allowed_UD.copy()
        self.nodes_left_U = np.full(layer.units, layer.min_nodes)

    def put(self, unit: int, device: int, tokens: float) -> None:
        layer, width = self.layer, int(self.layer.width_U[unit])
        self.left_D[device] -= width
        self.bytes_D[device] -= layer.bytes_U[unit]
        self.key_D[device] += layer.read_UD[unit, device] + layer.token_s_D[device] * tokens
        self.key_D[device] -= width * self.filler_s_D[device]
        self.open_UD[unit, device] = False
        self.nodes_left_U[unit] -= 1

    def best(self, unit: int, tokens: float, used_nodes: set[int]) -> int:
        """The open device that would finish first, or -1."""
        layer = self.layer
        time_D = self.key_D + layer.token_s_D * tokens + layer.read_UD[unit]
        time_D -= layer.width_U[unit] * self.filler_s_D
        open_D = self.open_UD[unit] & (self.left_D >= layer.width_U[unit])
        if not layer.plain:
            open_D &= self.bytes_D >= layer.bytes_U[unit]
            if self.nodes_left_U[unit] > 0 and used_nodes:
                open_D &= ~np.isin(layer.node_D, list(used_nodes))
        time_D[~open_D] = np.inf
        device = int(time_D.argmin())
        return device if open_D[device] else -1


def longest_first(layer: LayerProblem, count_U: IntArray, greed: Greed) -> Layout | None:
    """Replicas of equal shares, longest first, each to the device that finishes first; None if one finds no room."""
    unit_R = np.repeat(np.arange(layer.units), count_U)
    tokens_R = pieces(layer, count_U, greed.piece)
    by = (-tokens_R,) if layer.plain else (-tokens_R, -layer.min_nodes * (layer.tokens_U[unit_R] == 0))
    order = np.lexsort((unit_R, *by))
    unit_R, tokens_R = unit_R[order], tokens_R[order]
    total = int(count_U @ layer.width_U)
    if greed.by_quota:
        small = float(np.sort(tokens_R)[: max(1, len(tokens_R) // 2)].mean()) * greed.filler
        quota_D = quotas(layer, total, float(tokens_R.sum()) / total)
        filling = _Filling(layer, quota_D, layer.read_UD.min(axis=0) + layer.token_s_D * small)
    else:
        filling = _Filling(layer, layer.slots_D, np.zeros(layer.devices))
    return _assign(layer, filling, unit_R, tokens_R)


def pieces(layer: LayerProblem, count_U: IntArray, piece: float) -> FloatArray:
    """Tokens of every replica, units ascending: equal, or full pieces and a remainder (`Greed.piece`)."""
    equal_U = layer.tokens_U / count_U
    last_U = layer.tokens_U - (count_U - 1) * piece
    cut_U = (last_U > 0) & (last_U <= piece)
    last_R = np.zeros(int(count_U.sum()), dtype=np.bool_)
    last_R[np.cumsum(count_U) - 1] = True
    cut_R = np.where(last_R, np.repeat(last_U, count_U), piece)
    return np.where(np.repeat(cut_U, count_U), cut_R, np.repeat(equal_U, count_U))


def _assign(layer: LayerProblem, filling: _Filling, unit_R: IntArray, tokens_R: FloatArray) -> Layout | None:
    device_R = np.full(len(unit_R), -1, dtype=np.int64)
    pins: dict[int, list[int]] = {}
    if layer.pinned_UD.any():
        pins = {int(u): np.flatnonzero(layer.pinned_UD[u]).tolist() for u in np.flatnonzero(layer.pinned_UD.any(1))}
        for r, u in enumerate(unit_R.tolist()):
            if pins.get(u):
                device_R[r] = pins[u].pop(0)
                filling.put(u, int(device_R[r]), float(tokens_R[r]))
    nodes: dict[int, set[int]] = {}
    for r, (u, tokens) in enumerate(zip(unit_R.tolist(), tokens_R.tolist(), strict=True)):
        if device_R[r] < 0:
            device = filling.best(u, tokens, nodes.get(u, set()))
            if device < 0:
                return None
            device_R[r] = device
            filling.put(u, device, tokens)
        nodes.setdefault(u, set()).add(int(layer.node_D[device_R[r]]))
    return Layout(unit_R, device_R, tokens_R)
