"""One linear step of the per-batch split: tokens flow between replicas as current does through a network of resistors.

Devices above a bound feed in their excess, those below drain in proportion to their room, and two replicas conduct by
the tokens that they hold; so far-away devices relieve each other at once, and few replicas run empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .fields import FloatArray, IntArray

DRAIN = 0.1
"""Conductance of a device's drain, in its room: the less, the more evenly are the devices with room filled."""
NEAR = 4
"""Replicas of one expert up to so many places apart conduct."""


@dataclass(frozen=True, eq=False)
class Spread:
    """Prepared once per placement; P pairs of replicas of one expert.

    Parameters
    ----------
    left_P, right_P : ndarray, shape (P,)
        Positions of each pair's replicas.
    from_P, to_P : ndarray, shape (P,)
        Their devices.
    expert_P : ndarray, shape (P,)
    weight_D : ndarray, shape (D,)
        Tokens per second.
    """

    left_P: IntArray
    right_P: IntArray
    from_P: IntArray
    to_P: IntArray
    expert_P: IntArray
    weight_D: FloatArray

    @classmethod
    def of(cls, expert_R: IntArray, device_R: IntArray, token_s_D: FloatArray) -> Spread:
        lefts = [np.flatnonzero(expert_R[apart:] == expert_R[:-apart]) for apart in range(1, NEAR + 1)]
        left_P = np.concatenate(lefts)
        right_P = np.concatenate([left + apart for apart, left in enumerate(lefts, 1)])
        return cls(left_P, right_P, device_R[left_P], device_R[right_P], expert_R[left_P], 1.0 / token_s_D)

    def after(self, amount_R: IntArray, tokens_E: IntArray, time_D: FloatArray, bound_s: float) -> IntArray:
        """Whole tokens of every replica after the step (22); every expert keeps its total, none falls below 0."""
        if not len(self.left_P):
            return amount_R
        left_P, right_P, all_P = amount_R[self.left_P], amount_R[self.right_P], tokens_E[self.expert_P]
        both_P = left_P * right_P
        potential_D = self._potentials(both_P / np.maximum(all_P, 1), time_D, bound_s)
        current_P = (potential_D[self.from_P] - potential_D[self.to_P]) * (both_P / np.maximum(all_P, 1))
        most_P = both_P / np.maximum(all_P - left_P, 1)
        least_P = both_P / np.maximum(all_P - right_P, 1)
        sent_P = np.trunc(np.maximum(np.minimum(current_P, most_P), -least_P))
        gain_R = np.bincount(self.right_P, weights=sent_P, minlength=len(amount_R))
        gain_R -= np.bincount(self.left_P, weights=sent_P, minlength=len(amount_R))
        return amount_R + gain_R.astype(np.int64)

    def _potentials(self, conductance_P: FloatArray, time_D: FloatArray, bound_s: float) -> FloatArray:
        devices = len(time_D)
        room_D = self.weight_D * (bound_s - time_D)
        cell_P = self.from_P * devices + self.to_P
        one_way_DD = np.bincount(cell_P, weights=conductance_P, minlength=devices**2).reshape(devices, devices)
        laplacian_DD = -one_way_DD - one_way_DD.T
        drain_D = DRAIN * np.maximum(room_D, 1e-6 * bound_s * self.weight_D)
        laplacian_DD.flat[:: devices + 1] = drain_D - laplacian_DD.sum(axis=1)
        potential_D: FloatArray = np.linalg.solve(laplacian_DD, np.maximum(-room_D, 0.0))
        return potential_D
