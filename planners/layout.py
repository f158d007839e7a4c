"""Where the units of one layer are: the solvers' working form of a placement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .fields import FloatArray, IntArray
from .flow import Flow
from .units import LayerProblem


@dataclass(frozen=True, eq=False)
class Layout:
    """Replicas of one layer.

    Parameters
    ----------
    unit_R, device_R : ndarray, shape (R,)
        Unit and device of every replica.
    tokens_R : ndarray, shape (R,)
        Tokens of every replica, for the layer's mean loads.
    """

    unit_R: IntArray
    device_R: IntArray
    tokens_R: FloatArray

    def sorted(self) -> Layout:
        """The same replicas ordered by unit, then device."""
        order = np.lexsort((self.device_R, self.unit_R))
        return Layout(self.unit_R[order], self.device_R[order], self.tokens_R[order])


def fixed_time_D(layer: LayerProblem, unit_R: IntArray, device_R: IntArray, base_D: FloatArray) -> FloatArray:
    """Seconds of every device that do not depend on tokens: shared experts and weights read."""
    read_D = np.bincount(device_R, weights=layer.read_UD[unit_R, device_R], minlength=layer.devices)
    fixed: FloatArray = base_D + read_D
    return fixed


def flow_of(
    layer: LayerProblem, unit_R: IntArray, device_R: IntArray, tokens_U: FloatArray, base_D: FloatArray
) -> Flow:
    """Equal shares on the given replicas, ready to be balanced."""
    return Flow(
        tokens_U.tolist(),
        unit_R.tolist(),
        device_R.tolist(),
        layer.token_s_D.tolist(),
        fixed_time_D(layer, unit_R, device_R, base_D).tolist(),
    )


def device_time_D(layer: LayerProblem, layout: Layout) -> FloatArray:
    """Eq. 4 for the layer's mean loads."""
    work_D = np.bincount(layout.device_R, weights=layout.tokens_R, minlength=layer.devices) * layer.token_s_D
    time: FloatArray = fixed_time_D(layer, layout.unit_R, layout.device_R, layer.base_D) + work_D
    return time
