"""Measured expert loads: exponential windows over what the workers count, and their file. Pure but for the file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import OperatorError

Counts = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LoadWindow:
    """Routed (token, expert) pairs of the recent past; older ones count half per half-life.

    Parameters
    ----------
    pairs_LE : ndarray, shape (L, E)
    steps : float
        Forward passes in the same window.
    at_s : float
        Time of the last update.
    half_life_s : float
    """

    pairs_LE: Counts
    steps: float
    at_s: float
    half_life_s: float = 120.0

    @classmethod
    def empty(cls, layers: int, experts: int, at_s: float, half_life_s: float = 120.0) -> LoadWindow:
        return cls(np.zeros((layers, experts)), 0.0, at_s, half_life_s)

    def updated(self, pairs_LE: Counts, steps: int, now_s: float) -> LoadWindow:
        """The window after further pairs and steps, counted since the last update."""
        keep = 0.5 ** (max(0.0, now_s - self.at_s) / self.half_life_s)
        return LoadWindow(self.pairs_LE * keep + pairs_LE, self.steps * keep + steps, now_s, self.half_life_s)

    @property
    def per_step_LE(self) -> Counts:
        """Mean pairs per forward pass."""
        return self.pairs_LE / max(self.steps, 1e-9)


def write_loads(path: str, window: LoadWindow) -> None:
    """Write the window as ``concertina plan --loads`` reads it; the file is replaced whole or not at all.

    Raises
    ------
    OperatorError
        It cannot be written.
    """
    scenario = {"name": "measured", "counts_LE": window.per_step_LE.round(4).tolist()}
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        Path(temporary).write_text(json.dumps({"scenarios": [scenario]}), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        raise OperatorError(f"{path}: cannot be written: {e.strerror}") from e
