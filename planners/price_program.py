"""The linear program that finds the best prices of pieces at a trial time (eq. 17), its rows made as needed.

It is the dual of Gilmore and Gomory's program for cutting stock (1961), for units that may be cut too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import highspy as _highspy
import numpy as np

from .fields import FloatArray, IntArray
from .piece_cuts import Cuts
from .piece_prices import LATTICE, Kind, Prices

highspy: Any = _highspy  # its functions carry no annotations
ROUNDS = 30
TOLERANCE = 6e-4
"""Rounds of making rows, and the distance to the program's value at which they stop."""
MIX = 0.3
"""Rows are made at prices between the best ones and the program's, which jump about in the first rounds."""
BIG = 0.6
GROUP = 16
"""Units above this part of the largest piece have a column each, others one for so many of alike size."""


Pieces = tuple[float, ...]
"""Sizes in lattice points, largest first."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A time in question.

    Parameters
    ----------
    kinds : list of Kind
    step : float
        Tokens per lattice point.
    size_U : ndarray
        Tokens of every unit, in lattice points.
    """

    kinds: list[Kind]
    step: float
    size_U: FloatArray

    @cached_property
    def marks(self) -> IntArray:
        """Sizes at which a device is full with one, two or three equal pieces, each with the next lattice point.

        Prices jump there. Ascending, with both ends of the lattice.
        """
        found = [0, LATTICE]
        for kind in self.kinds:
            for count in range(1, min(kind.held, 3) + 1):
                room = max(kind.room - count * kind.read, 0.0) / self.step
                for parts in range(1, count + 1):
                    full = min(int(room / parts), LATTICE - 1)
                    found += [full, full + 1]
        return np.sort(np.array(found))

    def ratio(self, prices: Prices) -> float:
        """What the units are worth over what the devices hold: above 1, no placement takes so little time."""
        capacity = sum(kind.count * float(prices.most_held(kind, self.step)[0].max()) for kind in self.kinds)
        return float(Cuts(prices, self.size_U).least_U.sum()) / capacity if capacity > 0.0 else 0.0


@dataclass(frozen=True, eq=False)
class Priced:
    """Nearly the best prices at a trial time, and what the program's other side says.

    Parameters
    ----------
    trial : Trial
    ratio : float
        As in `Trial.ratio`.
    estimate : float
        What the program's value may be.
    prices : Prices
    bundles : list
        For each kind of devices, what they hold in the relaxation, and how many of them hold it.
    cuts : dict
        For units of a column of their own, the cut that most of it takes.
    """

    trial: Trial
    ratio: float
    estimate: float
    prices: Prices
    bundles: list[list[tuple[Pieces, float]]]
    cuts: dict[int, Pieces]


def best_prices(trial: Trial, first: Prices, tolerance: float = TOLERANCE) -> Priced:
    """Prices on the corners of ``first`` with nearly the largest ratio."""
    program = _Program(trial, len(first.at_K))
    best, found, prices = 0.0, first, first
    limit, limit_K = np.inf, first.price_K
    for _ in range(ROUNDS):
        held = [prices.most_held(kind, trial.step) for kind in trial.kinds]
        cuts = Cuts(prices, trial.size_U)
        capacity = sum(kind.count * float(worth.max()) for kind, (worth, _) in zip(trial.kinds, held, strict=True))
        ratio = float(cuts.least_U.sum()) / capacity if capacity > 0.0 else 0.0
        if ratio > best:
            best, found = ratio, Prices(first.at_K, prices.price_K * (program.devices / capacity))
        if limit - best < tolerance:
            break
        if program.add([weight_BK for _, weight_BK in held], cuts):
            limit, limit_K = program.solve()
            prices = Prices(first.at_K, MIX * limit_K + (1.0 - MIX) * found.price_K)
        elif prices.price_K is limit_K:
            break
        else:
            prices = Prices(first.at_K, limit_K)
    bundles, taken = program.primal(first.at_K)
    return Priced(trial, best, min(limit, best + tolerance), found, bundles, taken)


class _Program:
    """Columns: prices of corners, the worth that a device of each kind holds, the worth of every group of units."""

    def __init__(self, trial: Trial, corners: int) -> None:
        self.corners, self.kinds = corners, len(trial.kinds)
        self.order = np.argsort(trial.size_U, kind="stable")
        small = int((trial.size_U <= BIG * LATTICE).sum())
        self.first_G = np.concatenate((np.arange(0, small, GROUP), np.arange(small, len(self.order))))
        self.columns = corners + self.kinds + len(self.first_G)
        self.solution: FloatArray | None = None
        self.made: list[FloatArray] = []
        value = np.zeros(self.columns)
        value[corners + self.kinds :] = 1.0
        self.highs = highspy.Highs()
        self.highs.setOptionValue("output_flag", False)
        self.highs.setOptionValue("threads", 1)
        self.highs.addVars(self.columns, np.zeros(self.columns), np.full(self.columns, highspy.kHighsInf))
        self.highs.changeColsCost(self.columns, np.arange(self.columns, dtype=np.int32), value)
        self.highs.changeObjectiveSense(highspy.ObjSense.kMaximize)
        count_J = np.array([float(kind.count) for kind in trial.kinds])
        self.devices = float(count_J.sum())
        rows = np.zeros((corners, self.columns))
        rows[0, corners : corners + self.kinds] = count_J
        rows[np.arange(1, corners), np.arange(corners - 1)] = 1.0
        rows[np.arange(1, corners), np.arange(1, corners)] = -1.0
        self._rows(rows, np.append(self.devices, np.zeros(corners - 1)))

    def _rows(self, rows: FloatArray, most: FloatArray) -> None:
        there = rows != 0.0
        starts = np.concatenate(([0], np.cumsum(there.sum(axis=1))))[:-1].astype(np.int32)
        index = np.nonzero(there)[1].astype(np.int32)
        least = np.full(len(rows), -highspy.kHighsInf)
        self.highs.addRows(len(rows), least, most, len(index), starts, index, rows[there])

    def add(self, held: list[FloatArray], cuts: Cuts) -> int:
        """What devices hold at least, and units are worth at most; only rows that the last solution breaks, counted."""
        blocks = []
        for j, weight_BK in enumerate(held):
            rows = np.zeros((len(weight_BK), self.columns))
            rows[:, : self.corners] = weight_BK
            rows[:, self.corners + j] = -1.0
            blocks.append(rows)
        weight_GK = np.add.reduceat(cuts.weights()[self.order], self.first_G, axis=0)
        rows = np.zeros((len(weight_GK), self.columns))
        rows[:, : self.corners] = -weight_GK
        rows[:, self.corners + self.kinds :] = np.eye(len(weight_GK))
        every = np.concatenate([*blocks, rows])
        if self.solution is not None:
            every = every[every @ self.solution > 1e-6]
        if len(every):
            self._rows(every, np.zeros(len(every)))
            self.made.extend(every)
        return len(every)

    def solve(self) -> tuple[float, FloatArray]:
        """The program's value as a ratio, and its prices."""
        self.highs.run()
        self.solution = np.array(self.highs.getSolution().col_value)
        value = float(self.highs.getInfo().objective_function_value) / self.devices
        return value, np.maximum.accumulate(np.maximum(self.solution[: self.corners], 0.0))

    def primal(self, at_K: IntArray) -> tuple[list[list[tuple[Pieces, float]]], dict[int, Pieces]]:
        """Bundles of every kind, how many devices hold them, and cuts of units: the rows with a dual value."""
        bundles: list[list[tuple[Pieces, float]]] = [[] for _ in range(self.kinds)]
        most, cuts = dict[int, float](), dict[int, Pieces]()
        if self.solution is None:
            return bundles, cuts
        dual = np.abs(np.array(self.highs.getSolution().row_dual))[-len(self.made) :]
        size_G = np.diff(np.append(self.first_G, len(self.order)))
        for at in np.flatnonzero(dual > 1e-7).tolist():
            row, times = self.made[at], float(dual[at])
            pieces = _pieces(np.abs(row[: self.corners]), at_K)
            column = int(np.flatnonzero(row[self.corners :])[0])
            group = column - self.kinds
            if group < 0:
                bundles[column].append((pieces, times))
            elif size_G[group] == 1 and times > most.get(unit := int(self.order[self.first_G[group]]), 0.0):
                most[unit], cuts[unit] = times, pieces
        return bundles, cuts


def _pieces(weight_K: FloatArray, at_K: IntArray) -> Pieces:
    """Pieces on corners, and the last between two of them."""
    whole_K = np.floor(weight_K + 1e-9)
    part_K = weight_K - whole_K
    pieces = np.repeat(at_K, whole_K.astype(np.int64)).astype(np.float64).tolist()
    if part_K.sum() > 0.5:
        pieces.append(float(part_K @ at_K))
    return tuple(sorted(pieces, reverse=True))
