"""Load scenarios beyond those that were seen, so that replicas are chosen for the freedom they give."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .fields import FloatArray, finite
from .model import Loads

FREEDOM = 4.0
"""Degrees of freedom of the noise: held-out domains have experts far from anything seen, more than a normal law has."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How `with_samples` draws scenarios.

    Parameters
    ----------
    count : int
        Scenarios to add.
    weight : float
        Their part of the total weight, in [0, 1).
    floor : float
        Tokens added to every expert before logarithms are taken, in means of the layer: rare experts are not sure to
        stay rare.
    sigma : float
        Standard deviation of an expert's logarithm where nothing is known; what the scenarios show is mixed with it.
    belief : float
        How many scenarios that prior counts for.
    seed : int
    """

    count: int = 24
    weight: float = 0.7
    floor: float = 0.5
    sigma: float = 0.7
    belief: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "floor", "sigma", "belief", "seed"):
            finite(f"sampling: {name}", getattr(self, name))
        finite("sampling: weight", self.weight, 0.0, 0.999)


def with_samples(loads: Loads, sampling: Sampling | None = None) -> Loads:
    """The given scenarios and sampled ones (eq. 15).

    The logarithm of an expert's tokens is taken as Student-t, independent between experts, with the mean over the given
    scenarios and their variance mixed with a prior. Each sample keeps the layer's mean number of tokens.
    """
    sampling = sampling or Sampling()
    if sampling.count == 0 or sampling.weight == 0:
        return loads
    weight_S = loads.scenario_weights_S
    log_SLE, total_L = _logarithms(loads, sampling.floor)
    mean_LE = np.tensordot(weight_S, log_SLE, axes=1)
    square_LE = np.tensordot(weight_S, (log_SLE - mean_LE) ** 2, axes=1) * len(weight_S)
    known = len(weight_S) - 1
    sigma_LE = np.sqrt((sampling.belief * sampling.sigma**2 + square_LE) / (sampling.belief + known))
    draw = np.random.default_rng(sampling.seed)
    noise = draw.standard_t(FREEDOM, (sampling.count, *mean_LE.shape)) / np.sqrt(FREEDOM / (FREEDOM - 2.0))
    drawn = np.exp(mean_LE + sigma_LE * noise)
    drawn *= (total_L / drawn.sum(axis=2))[:, :, None]
    weights = np.concatenate(
        [weight_S * (1 - sampling.weight), np.full(sampling.count, sampling.weight / sampling.count)]
    )
    return replace(loads, tokens_SLE=np.concatenate([loads.tokens_SLE, drawn]), weights_S=weights)


def _logarithms(loads: Loads, floor: float) -> tuple[FloatArray, FloatArray]:
    """Logarithms of the scenarios' loads, each layer scaled to its mean total; and that total, shape (L,)."""
    total_SL = loads.tokens_SLE.sum(axis=2)
    total_L: FloatArray = loads.scenario_weights_S @ total_SL
    scale_SL = total_L / np.maximum(total_SL, 1e-300)
    mean_L = np.maximum(total_L / loads.tokens_SLE.shape[2], 1e-300)
    shifted: FloatArray = np.log(loads.tokens_SLE * scale_SL[:, :, None] + floor * mean_L[:, None] + 1e-300)
    return shifted, total_L
