"""What a placement costs, by term (equations of ``planners/README.md``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .fields import FloatArray


@dataclass(frozen=True, eq=False)
class Cost:
    """Seconds by term; every term is already weighted over regimes and scenarios.

    Parameters
    ----------
    step_L : ndarray, shape (L,)
        Per layer, the slowest device's time (eq. 4, 7, 8).
    node_L, cluster_L : ndarray, shape (L,)
        Communication within and between nodes (eq. 5).
    moves : float
        Price of replicas that are not in the current placement (eq. 9).
    device_LD : ndarray, shape (L, D)
        Expected time of every device: weights read plus token work.
    read_LD : ndarray, shape (L, D)
        The part of ``device_LD`` that reads weights.
    """

    step_L: FloatArray
    node_L: FloatArray
    cluster_L: FloatArray
    moves: float
    device_LD: FloatArray
    read_LD: FloatArray

    @property
    def total(self) -> float:
        return float(self.step_L.sum() + self.node_L.sum() + self.cluster_L.sum() + self.moves)

    def to_dict(self) -> dict[str, Any]:
        """Totals by term, JSON-ready."""
        return {
            "total_s": self.total,
            "step_s": float(self.step_L.sum()),
            "node_s": float(self.node_L.sum()),
            "cluster_s": float(self.cluster_L.sum()),
            "moves_s": self.moves,
        }
