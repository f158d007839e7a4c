"""A bound on every split of a batch, from a guess at one.

Tokens of experts that are on devices of a set only stay there, however they are split. The slowest devices of a guess
are usually such a set, and then the bound is the optimum itself, long before the guess is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .fields import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class ClosedSets:
    """Prepared once per placement.

    Parameters
    ----------
    device_R : ndarray, shape (R,)
        Device of every replica, experts ascending.
    first_R : ndarray of int
        Position of every expert's first replica.
    weight_D : ndarray, shape (D,)
        Tokens per second.
    fixed_D : ndarray, shape (D,)
        Time that does not depend on tokens, in tokens.
    """

    device_R: IntArray
    first_R: IntArray
    weight_D: FloatArray
    fixed_D: FloatArray

    def bound(self, tokens_E: IntArray, time_D: FloatArray) -> float:
        """The largest of (21) over the sets of the 1, 2, ... slowest devices."""
        slowest_D = np.argsort(-time_D)
        place_D = np.empty(len(slowest_D), dtype=np.int64)
        place_D[slowest_D] = np.arange(len(slowest_D))
        last_E = np.maximum.reduceat(place_D[self.device_R], self.first_R)
        tied_D = np.bincount(last_E, weights=tokens_E, minlength=len(slowest_D)) + self.fixed_D[slowest_D]
        return float((tied_D.cumsum() / self.weight_D[slowest_D].cumsum()).max())
