"""First layouts for a target time: devices are filled one by one as nearly as their few replicas allow.

Longest-first leaves gaps where a device holds only two to five replicas, or where reading weights outweighs the tokens.
Here each device takes the longest replica left and the companions that fill it best up to the target (the minimum bin
slack heuristic of Gupta and Ho 1999, with at most three companions chosen by exact two-sums).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .construct import pieces
from .fields import FloatArray, IntArray
from .layout import Layout
from .units import LayerProblem

WORTH = 0.003
"""Part of a device's room that one more companion must save: the smallest replicas are kept for the last gaps."""


@dataclass(frozen=True, slots=True)
class Target:
    """What to fill to.

    Parameters
    ----------
    time_s : float
        Target time of the layer.
    company : float
        Leave room beside a full piece for this many replicas of the smallest kind.
    """

    time_s: float
    company: float


def cut_for(layer: LayerProblem, target: Target) -> tuple[IntArray, float] | None:
    """Replica counts and piece size (tokens) with which no piece is too long for the fastest device at the target.

    None if the pieces outnumber slots or devices.
    """
    room_D = (target.time_s - layer.base_D - layer.read_UD.min(axis=0)) / layer.token_s_D
    best = int(np.where(layer.slots_D > 0, room_D, -np.inf).argmax())
    small = float(np.sort(layer.tokens_U)[: max(1, layer.units // 4)].mean())
    beside = layer.read_UD[:, best].min() / layer.token_s_D[best] + small
    piece = float(room_D[best] - target.company * beside)
    if piece <= 0:
        return None
    count_U = np.maximum(1, np.ceil(layer.tokens_U / piece - 1e-9)).astype(np.int64)
    too_many = int(count_U.sum()) > int(layer.slots_D.sum()) or int(count_U.max()) > int((layer.slots_D > 0).sum())
    return None if too_many else (count_U, piece)


def filled(layer: LayerProblem, target: Target) -> Layout | None:
    """A layout near the target time, or None if pieces outnumber slots or devices; for plain layers."""
    cut = cut_for(layer, target)
    if cut is None:
        return None
    count_U, piece = cut
    unit_R = np.repeat(np.arange(layer.units), count_U)
    tokens_R = pieces(layer, count_U, piece)
    order = np.argsort(-tokens_R, kind="stable")
    return _Filler(layer, unit_R[order], tokens_R[order]).run(target.time_s)


class _Filler:
    """Replicas longest first, and which are still without a device."""

    def __init__(self, layer: LayerProblem, unit_R: IntArray, tokens_R: FloatArray) -> None:
        self.layer = layer
        self.unit_R = unit_R
        self.tokens_R = tokens_R
        self.device_R = np.full(len(unit_R), -1, dtype=np.int64)
        self.twice_R = np.bincount(unit_R)[unit_R] > 1
        self.slots_left_D = layer.slots_D.copy()

    def run(self, time_s: float) -> Layout | None:
        layer = self.layer
        read_D = layer.read_UD[0] / layer.token_s_D
        room_D = (time_s - layer.base_D) / layer.token_s_D
        for d in np.lexsort((layer.slots_D, -(room_D - read_D))).tolist():
            self._fill(d, float(room_D[d]), float(read_D[d]))
        return self._rest()

    def _open(self) -> IntArray:
        return np.flatnonzero(self.device_R < 0)

    def _fill(self, d: int, room: float, read: float) -> None:
        """Choose what device ``d`` holds; ``room`` and ``read`` are in tokens."""
        open_R = self._open()
        slots = int(self.slots_left_D[d])
        if len(open_R) == 0 or slots == 0:
            return
        least = len(open_R) - (int(self.slots_left_D.sum()) - slots)
        fits = np.flatnonzero(self.tokens_R[open_R] + read + max(0, least - 1) * read <= room)
        full = room
        lead = int(open_R[fits[0]]) if len(fits) else int(open_R[-1])
        self._give(d, [lead])
        room -= read + float(self.tokens_R[lead])
        rest = open_R[open_R != lead]
        if self.twice_R[lead]:
            rest = rest[self.unit_R[rest] != self.unit_R[lead]]
        rest = self._one_per_unit(rest)
        while least - 1 > 3 and len(rest):
            self._give(d, [int(rest[-1])])
            room -= read + float(self.tokens_R[rest[-1]])
            rest, least, slots = rest[:-1], least - 1, slots - 1
        self._give(d, self._companions(rest, room, read, max(0, least - 1), slots - 1, full))

    def _one_per_unit(self, rest: IntArray) -> IntArray:
        """At most one replica of every unit, so that companions never clash."""
        _, first = np.unique(self.unit_R[rest], return_index=True)
        return rest[np.sort(first)]

    def _companions(
        self, rest: IntArray, room: float, read: float, least: int, most: int, full: float = 1.0
    ) -> list[int]:
        """Up to three replicas (at least ``least``) whose tokens and reads fill ``room`` best without exceeding it."""
        best, waste = [int(r) for r in rest[len(rest) - least :]] if least else [], np.inf
        if least == 0:
            waste = room
        tokens = self.tokens_R[rest][::-1]
        for count in (1, 2, 3):
            if count < least or count > most or count > len(rest):
                continue
            chosen = fullest(tokens, room - count * read, count)
            if chosen is not None:
                left = room - count * read - float(tokens[chosen].sum())
                if left < waste - WORTH * full:
                    best, waste = [int(rest[len(rest) - 1 - k]) for k in chosen], left
        return best

    def _give(self, d: int, replicas: list[int]) -> None:
        self.device_R[replicas] = d
        self.slots_left_D[d] -= len(replicas)

    def _rest(self) -> Layout | None:
        """Whatever found no place goes where it finishes first."""
        layer = self.layer
        done = self.device_R >= 0
        work_D = np.bincount(self.device_R[done], weights=self.tokens_R[done], minlength=layer.devices)
        count_D = np.bincount(self.device_R[done], minlength=layer.devices)
        time_D = layer.base_D + work_D * layer.token_s_D + count_D * layer.read_UD[0]
        for r in self._open().tolist():
            holds = self.device_R[self.unit_R == self.unit_R[r]]
            then_D = np.where(
                self.slots_left_D > 0, time_D + self.tokens_R[r] * layer.token_s_D + layer.read_UD[0], np.inf
            )
            then_D[holds[holds >= 0]] = np.inf
            d = int(then_D.argmin())
            if not np.isfinite(then_D[d]):
                return None
            time_D[d] = then_D[d]
            self._give(d, [r])
        return Layout(self.unit_R, self.device_R, self.tokens_R)


def fullest(tokens: FloatArray, room: float, count: int) -> list[int] | None:
    """Positions of ``count`` of the ascending ``tokens`` with the largest sum up to ``room``; three: greedy first."""
    if room < 0:
        return None
    if count == 1:
        k = int(np.searchsorted(tokens, room, side="right")) - 1
        return [k] if k >= 0 else None
    if count == 2:
        partner = np.minimum(np.searchsorted(tokens, room - tokens, side="right") - 1, np.arange(len(tokens)) - 1)
        sums = np.where(partner >= 0, tokens + tokens[partner], -1.0)
        k = int(sums.argmax())
        return [k, int(partner[k])] if sums[k] >= 0 else None
    third = int(np.searchsorted(tokens, room / 3, side="right")) - 1
    if third < 0:
        return None
    others = np.delete(np.arange(len(tokens)), third)
    pair = fullest(tokens[others], room - float(tokens[third]), 2)
    return None if pair is None else [third, *(int(others[k]) for k in pair)]
