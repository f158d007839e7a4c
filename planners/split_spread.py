"""One linear step of the per-batch split: tokens flow between replicas as current does between equal resistors.

Were no replica to run empty, the potentials that solve the graph's Laplacian would even out all devices at once, with
the least flow in the sum of squares. Where one would, its expert's flow is cut short.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .fields import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Spread:
    """Prepared once per placement; P pairs of neighbouring replicas of one expert.

    Parameters
    ----------
    expert_R : ndarray, shape (R,)
        Expert of every replica, ascending.
    first_R : ndarray of int
        Position of every expert's first replica.
    left_P : ndarray, shape (P,)
        Position of each pair's first replica; the second follows it.
    from_P, to_P : ndarray, shape (P,)
        Their devices.
    potential_DD : ndarray, shape (D, D)
        Maps devices' times to potentials, whose difference over a pair is the tokens to send.
    """

    expert_R: IntArray
    first_R: IntArray
    left_P: IntArray
    from_P: IntArray
    to_P: IntArray
    potential_DD: FloatArray

    @classmethod
    def of(cls, expert_R: IntArray, device_R: IntArray, token_s_D: FloatArray) -> Spread:
        left_P = np.flatnonzero(expert_R[1:] == expert_R[:-1])
        from_P, to_P = device_R[left_P], device_R[left_P + 1]
        devices = len(token_s_D)
        laplacian_DD = np.zeros((devices, devices))
        for a, b, sign in ((from_P, from_P, 1.0), (to_P, to_P, 1.0), (from_P, to_P, -1.0), (to_P, from_P, -1.0)):
            np.add.at(laplacian_DD, (a, b), sign)
        inverse_DD = np.linalg.pinv(laplacian_DD, hermitian=True)
        joined_DD = (np.eye(devices) - laplacian_DD @ inverse_DD > 1e-9).astype(np.float64)
        weight_D = 1.0 / token_s_D
        level_DD = joined_DD * weight_D / (joined_DD @ weight_D)[:, None]
        potential_DD = inverse_DD @ (weight_D[:, None] * (np.eye(devices) - level_DD))
        first_R = np.flatnonzero(np.diff(expert_R, prepend=-1) > 0)
        return cls(expert_R, first_R, left_P, from_P, to_P, potential_DD)

    def after(self, amount_R: IntArray, time_D: FloatArray) -> IntArray:
        """Whole tokens of every replica after the step; every expert keeps its total."""
        potential_D = self.potential_DD @ time_D
        sent_P = potential_D[self.from_P] - potential_D[self.to_P]
        gain_R = np.zeros(len(amount_R))
        gain_R[self.left_P] -= sent_P
        gain_R[self.left_P + 1] += sent_P
        after_R = np.maximum(amount_R + gain_R * self._kept_R(amount_R, gain_R), 0.0)
        upto_R = np.cumsum(after_R)
        before_E = upto_R[self.first_R] - after_R[self.first_R]
        whole_R: IntArray = np.rint(upto_R - before_E[self.expert_R]).astype(np.int64)
        whole_R[1:] -= np.where(self.expert_R[1:] == self.expert_R[:-1], whole_R[:-1], 0)
        return whole_R

    def _kept_R(self, amount_R: IntArray, gain_R: FloatArray) -> FloatArray:
        """Part of the flow of each replica's expert that leaves no replica of it below 0."""
        short_R = amount_R + gain_R < 0.0
        if not short_R.any():
            return np.ones(len(amount_R))
        part_R = np.where(short_R, amount_R / np.where(short_R, -gain_R, 1.0), 1.0)
        kept: FloatArray = np.minimum.reduceat(part_R, self.first_R)[self.expert_R]
        return kept
