"""Expected value and tail mean over scenarios (eq. 7, 8)."""

from __future__ import annotations

import numpy as np

from .fields import FloatArray, IntArray


def tail_mean(value_S: FloatArray, weight_S: FloatArray, tail: float) -> float:
    """CVaR: the mean of the worst ``1 - tail`` part of the weight (Rockafellar and Uryasev 2000)."""
    worst = np.argsort(-value_S, kind="stable")
    before = np.cumsum(weight_S[worst]) - weight_S[worst]
    part = np.clip((1.0 - tail) * weight_S.sum() - before, 0.0, weight_S[worst])
    return float(part @ value_S[worst] / part.sum())


def risk(scenario_C: IntArray, weight_C: FloatArray, time_C: FloatArray, tail: float) -> float:
    """Times of all cases as one number: mean over regimes, then tail mean over scenarios."""
    weight_S = np.bincount(scenario_C, weights=weight_C).astype(np.float64)
    total_S = np.bincount(scenario_C, weights=weight_C * time_C)
    mean_S = np.divide(total_S, weight_S, out=np.zeros(len(weight_S)), where=weight_S > 0)
    return tail_mean(mean_S, weight_S, tail)
