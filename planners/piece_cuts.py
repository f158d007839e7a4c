"""What units are worth at least under prices of pieces, each cut as is cheapest for it (eq. 17)."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .fields import FloatArray, IntArray
from .piece_prices import LATTICE, MOST_PIECES, Prices

TIE = 1e-9
"""Relative gain below which a unit stays whole."""


class Cuts:
    """Cheapest cuts of all units.

    Parameters
    ----------
    prices : Prices
    size_U : ndarray
        Tokens of every unit, in lattice points.
    """

    def __init__(self, prices: Prices, size_U: FloatArray) -> None:
        self.prices = prices
        self.size_U = size_U
        self._table, self._closed = _least_sums(prices, int(size_U.max()) + 1)
        fits_U = size_U <= LATTICE * (1.0 + 1e-12)
        self.whole_U: FloatArray = np.where(fits_U, prices.at(size_U), np.inf)
        below_U = np.maximum(np.ceil(size_U).astype(np.int64) - 1, 0)
        part_U = (size_U - below_U)[:, None]
        falling_N = prices.price_N[::-1]
        padded = np.concatenate((np.full(LATTICE - 1, np.inf), self._table))
        total_UN = sliding_window_view(padded, LATTICE)[below_U]
        total_UN += part_U * (falling_N[:-1] - falling_N[1:])
        total_UN += falling_N[1:]
        best_U = total_UN.argmin(axis=1)
        self.sum_U: IntArray = below_U - (LATTICE - 1) + best_U
        cut_U = total_UN[np.arange(len(size_U)), best_U]
        self.worth_U: FloatArray = np.minimum(self.whole_U, cut_U)
        self.least_U: FloatArray = self.worth_U if self._closed else np.minimum(self.worth_U, self._line_U())

    def _line_U(self) -> FloatArray:
        """More pieces than were looked at: none is below the line from the first corner along the least slope."""
        at_K, price_K = self.prices.at_K, self.prices.price_K
        slope = float(((price_K[1:] - price_K[0]) / at_K[1:]).min())
        line_U: FloatArray = (MOST_PIECES + 1) * price_K[0] + slope * self.size_U
        return line_U

    def weights(self) -> FloatArray:
        """How often every corner's price counts in every unit's worth, shape (U, K)."""
        cut_U = self.worth_U < self.whole_U * (1.0 - TIE)
        weight_UK = self.prices.weights(np.where(cut_U, self.size_U - self.sum_U, self.size_U))
        for u in np.flatnonzero(cut_U).tolist():
            np.add.at(weight_UK[u], self._corners_of(int(self.sum_U[u])), 1.0)
        return weight_UK

    def _corners_of(self, total: int) -> list[int]:
        """Corners that are worth least at this sum."""
        at_K, price_K = self.prices.at_K[1:], self.prices.price_K[1:]
        if total == 0:
            return [0]
        corners = list[int]()
        while total > 0:
            rest_K = total - at_K
            worth_K = np.where(rest_K > 0, self._table[np.maximum(rest_K, 0)], np.where(rest_K == 0, 0.0, np.inf))
            corners.append(1 + int((worth_K + price_K).argmin()))
            total -= int(at_K[corners[-1] - 1])
        return corners


def _least_sums(prices: Prices, most: int) -> tuple[FloatArray, bool]:
    """Least worth of up to `MOST_PIECES` pieces on corners by their sum, and whether more pieces are worth no less."""
    table = np.full(most + 1, np.inf)
    within = prices.at_K <= most
    table[prices.at_K[within]] = prices.price_K[within]
    index = np.arange(LATTICE, LATTICE + most + 1)[:, None] - prices.at_K
    for _ in range(1, MOST_PIECES):
        padded = np.concatenate((np.full(LATTICE, np.inf), table))
        then = np.minimum(table, (padded[index] + prices.price_K).min(axis=1))
        if (then >= table * (1.0 - 1e-13)).all():
            return table, True
        table = then
    return table, False
