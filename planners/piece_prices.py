"""Prices of pieces by their tokens (eq. 17): what a device can hold at most, and what every unit is worth at least.

A price function is nondecreasing and piecewise linear. The most that a device holds and the cheapest cut of a unit are
then reached with all pieces but one on corners of it: of two pieces between corners, one can grow at the other's
expense without loss until one of them is at a corner. Corners lie on a lattice, so sums of corners do too, and both are
found exactly by adding one piece after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .fields import FloatArray, IntArray
from .units import LayerProblem

LATTICE = 240
"""Lattice points in the largest piece."""
MOST_PIECES = 64
"""Pieces of one unit up to which the cheapest cut is found exactly; more of them are bounded from below."""
ROUNDING = 1e-12
"""Relative room added to devices, so that rounding never refutes a time that a placement reaches."""
BLOCKS = 6
"""Bundles of one number of pieces that are returned, each the best of a range of sums."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Devices alike: room and reading in tokens, slots, and which they are."""

    room: float
    read: float
    slots: int
    devices: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.devices)

    @property
    def held(self) -> int:
        """Most replicas that it has slots and time for."""
        room = self.room * (1.0 + ROUNDING)
        return self.slots if self.slots * self.read <= room else int(room / self.read)


def kinds_at(layer: LayerProblem, base_D: FloatArray, time_s: float) -> list[Kind]:
    """Kinds of devices that can hold anything in ``time_s`` seconds; for plain layers."""
    table = np.stack([(time_s - base_D) / layer.token_s_D, layer.read_UD[0] / layer.token_s_D, layer.slots_D], axis=1)
    rows, kind_D = np.unique(table, axis=0, return_inverse=True)
    of = [tuple(np.flatnonzero(kind_D.ravel() == j).tolist()) for j in range(len(rows))]
    kinds = [
        Kind(room, read, int(slots), devices) for (room, read, slots), devices in zip(rows.tolist(), of, strict=True)
    ]
    return [kind for kind in kinds if kind.held > 0 and kind.room > kind.read]


class Prices:
    """A price function by its values at corners.

    Parameters
    ----------
    at_K : ndarray of int
        Corners in lattice points, from 0 to `LATTICE`.
    price_K : ndarray
        Nonnegative and nondecreasing.
    """

    def __init__(self, at_K: IntArray, price_K: FloatArray) -> None:
        self.at_K = at_K
        self.price_K = price_K
        self.price_N = np.interp(np.arange(LATTICE + 1), at_K, price_K)
        self.corner_sums = [np.where(np.isin(np.arange(LATTICE + 1), at_K), self.price_N, -np.inf)]

    def at(self, size: FloatArray) -> FloatArray:
        """Prices of pieces of ``size`` lattice points."""
        return np.interp(size, self.at_K, self.price_K)

    def most_sums(self, pieces: int) -> FloatArray:
        """Most that ``pieces`` pieces on corners are worth, by their sum in lattice points up to one largest piece.

        No device holds more beside another piece.
        """
        tables = self.corner_sums
        while len(tables) < pieces:
            padded = np.concatenate((np.full(LATTICE, -np.inf), tables[-1]))
            tables.append((padded[_before(LATTICE + 1, self.at_K)] + self.price_K).max(axis=1))
        return tables[pieces - 1]

    def corners_of(self, pieces: int, total: int) -> tuple[int, ...]:
        """Corners with which ``pieces`` pieces are worth most at this sum."""
        found = []
        for left in range(pieces - 1, 0, -1):
            rest_K = total - self.at_K
            worth_K = np.where(rest_K >= 0, self.most_sums(left)[np.maximum(rest_K, 0)] + self.price_K, -np.inf)
            corner = int(worth_K.argmax())
            found.append(corner)
            total -= int(self.at_K[corner])
        return (*found, int(np.searchsorted(self.at_K, total)))

    def most_held(self, kind: Kind, step: float) -> tuple[FloatArray, FloatArray]:
        """Pieces worth most on a device, several for every number of replicas; ``step`` is tokens per lattice point.

        A single piece that fills the device is no larger than the lattice.

        Returns their worth, shape (B,), and how often every corner's price counts in it, shape (B, K).
        """
        worth, last, rest = list[float](), list[float](), list[tuple[int, ...]]()
        for count in range(1, kind.held + 1):
            room = (kind.room * (1.0 + ROUNDING) - count * kind.read) / step
            if room < 0.0:
                break
            sums = np.arange(min(int(room), LATTICE) + 1 if count > 1 else 1)
            last_N = np.minimum(room - sums, float(LATTICE))
            worth_N = self.at(last_N) + (self.most_sums(count - 1)[sums] if count > 1 else 0.0)
            for block in np.array_split(sums, min(BLOCKS, len(sums))):
                best = int(block[worth_N[block].argmax()])
                if np.isfinite(worth_N[best]):
                    worth.append(float(worth_N[best]))
                    last.append(float(last_N[best]))
                    rest.append(self.corners_of(count - 1, best) if count > 1 else ())
        weight_BK = self.weights(np.array(last))
        for row, corners in zip(weight_BK, rest, strict=True):
            np.add.at(row, list(corners), 1.0)
        return np.array(worth), weight_BK

    def weights(self, size_I: FloatArray) -> FloatArray:
        """How often every corner's price counts for a piece of each size, shape (I, K)."""
        within_I = np.clip(size_I, 0.0, float(LATTICE))
        k_I = np.clip(np.searchsorted(self.at_K, within_I, side="right") - 1, 0, len(self.at_K) - 2)
        part_I = (within_I - self.at_K[k_I]) / (self.at_K[k_I + 1] - self.at_K[k_I])
        weight_IK = np.zeros((len(size_I), len(self.at_K)))
        every = np.arange(len(size_I))
        weight_IK[every, k_I] = 1.0 - part_I
        weight_IK[every, k_I + 1] = part_I
        return weight_IK


def _before(sums: int, at_K: IntArray) -> IntArray:
    """Index of ``sum - corner`` in a table that `LATTICE` entries precede, shape (sums, K)."""
    index: IntArray = np.arange(LATTICE, LATTICE + sums)[:, None] - at_K
    return index
