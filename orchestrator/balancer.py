"""Follows the measured loads of a deployment, and says when its experts should move."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from ..errors import OperatorError
from ..planners.model import Loads, ModelSpec
from ..planners.placement import Placement
from ..planners.solution import Clock
from ..workers.roles import WorkerReport
from .loads import LoadWindow, write_loads
from .placing import Site, better_placement

_log = logging.getLogger(__name__)
_LEAST_PAIRS_PER_EXPERT = 20.0  # with fewer, differences between experts are noise


class Balancer:
    """Loads and plans of one deployment.

    Parameters
    ----------
    model : ModelSpec
    every_s : float
        Time between two plans, which is also the horizon over which a move must pay; 0 never plans.
    loads_file : str or None
        Where the window is kept for the next start.
    now : callable
        Seconds.
    """

    def __init__(self, model: ModelSpec, every_s: float, loads_file: str | None, now: Clock) -> None:
        self._every_s, self._file, self._now = every_s, loads_file, now
        self.window = LoadWindow.empty(model.layers, model.experts, now())
        self._seen: dict[tuple[str, int], tuple[np.ndarray, int]] | None = None  # nobody has been observed yet
        self._planned_s = now()
        self.reason = "no plan yet"

    def observe(self, reports: Mapping[str, WorkerReport]) -> None:
        """Add what workers have counted since they were last seen; a new generation counts from zero.

        What they had counted at the first look is left out: a controller before this one has seen it.
        """
        pairs, steps, seen = np.zeros_like(self.window.pairs_LE), 0, dict[tuple[str, int], tuple[np.ndarray, int]]()
        for name, report in reports.items():
            if not report.counts_LE:
                continue
            key = (name, report.counted)
            counts = np.asarray(report.counts_LE, dtype=np.float64)
            begun = (counts if self._seen is None else np.zeros_like(counts)), report.stats.steps
            before, steps_before = (self._seen or {}).get(key, begun)
            pairs += counts - before
            steps = max(steps, report.stats.steps - steps_before)
            seen[key] = (counts, report.stats.steps)
        self._seen = seen
        self.window = self.window.updated(pairs, steps, self._now())

    @property
    def loads(self) -> Loads | None:
        """Measured loads per step, once there are enough of them."""
        enough = self.window.pairs_LE.sum() >= _LEAST_PAIRS_PER_EXPERT * self.window.pairs_LE.size
        return Loads(self.window.per_step_LE) if enough else None

    @property
    def due(self) -> bool:
        """Whether it is time to plan, and enough has been seen."""
        late = self._every_s > 0 and self._now() - self._planned_s >= self._every_s
        return late and self.loads is not None

    def plan(self, site: Site, current: Placement) -> Placement | None:
        """A placement that serves the measured loads better, or None. Takes up to seconds: call it in a thread."""
        self._planned_s = self._now()
        if self._file is not None:
            self._keep(self._file)
        loads = Loads(self.window.per_step_LE)
        verdict = better_placement(site, loads, current, self._every_s, self._now)
        self.reason = verdict.reason
        _log.info("placement: %s", verdict.reason)
        return verdict.placement

    def _keep(self, path: str) -> None:
        try:
            write_loads(path, self.window)
        except OperatorError as e:
            _log.error("measured loads are not kept: %s", e)
