"""Load scenarios beyond those that were seen, so that replicas are chosen for the freedom they give."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .fields import FloatArray, finite
from .model import Loads


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

    count: int = 48
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
    noise = _stratified(sampling.count, mean_LE.shape, np.random.default_rng(sampling.seed))
    drawn = np.exp(mean_LE + sigma_LE * noise)
    drawn *= (total_L / drawn.sum(axis=2))[:, :, None]
    weights = np.concatenate(
        [weight_S * (1 - sampling.weight), np.full(sampling.count, sampling.weight / sampling.count)]
    )
    return replace(loads, tokens_SLE=np.concatenate([loads.tokens_SLE, drawn]), weights_S=weights)


def _stratified(count: int, shape: tuple[int, ...], draw: np.random.Generator) -> FloatArray:
    """Noise of variance near 1, shape (count, *shape): every expert gets each of ``count`` quantiles once.

    Held-out domains have experts far from anything seen, more than a normal law has: Student's t with four degrees of
    freedom, whose quantiles have a closed form (Shaw 2006, eq. 36). Strata keep chance from favouring experts.
    """
    p = (np.arange(count) + 0.5) / count
    alpha = 4.0 * p * (1.0 - p)
    quantile = 2.0 * np.sign(p - 0.5) * np.sqrt(np.cos(np.arccos(np.sqrt(alpha)) / 3.0) / np.sqrt(alpha) - 1.0)
    order = np.argsort(draw.random((count, *shape)), axis=0)
    noise: FloatArray = quantile[order] / np.sqrt(2.0)
    return noise


def _logarithms(loads: Loads, floor: float) -> tuple[FloatArray, FloatArray]:
    """Logarithms of the scenarios' loads, each layer scaled to its mean total; and that total, shape (L,)."""
    total_SL = loads.tokens_SLE.sum(axis=2)
    total_L: FloatArray = loads.scenario_weights_S @ total_SL
    scale_SL = total_L / np.maximum(total_SL, 1e-300)
    mean_L = np.maximum(total_L / loads.tokens_SLE.shape[2], 1e-300)
    shifted: FloatArray = np.log(loads.tokens_SLE * scale_SL[:, :, None] + floor * mean_L[:, None] + 1e-300)
    return shifted, total_L
