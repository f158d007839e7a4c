"""Load scenarios beyond those that were seen, so that replicas are chosen for the freedom they give."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .fields import FloatArray, fail, finite
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
    common : float
        Part of the variance that experts share along the deviations of the given scenarios, in [0, 1].
    transferred : float
        Part of the samples that transfer ranks (eq. 20) where there are two scenarios or more, in [0, 1].
    jitters : tuple of float
        Standard deviations of the exchange of ranks, in experts of the layer; samples take them in turn. How far ranks
        carry over to a new domain is not known, so the scales reach from neighbours to any rank.
    powers : tuple of float
        Samples are raised to these, in turn, and scaled back to their totals: a new domain may be sharper than those
        seen, by how much is not known either.
    seed : int
    """

    count: int = 240
    weight: float = 0.7
    floor: float = 0.5
    sigma: float = 0.7
    belief: float = 2.0
    common: float = 0.5
    transferred: float = 0.75
    jitters: tuple[float, ...] = (1.0 / 16.0, 1.0 / 4.0, 1.0)
    powers: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "floor", "sigma", "belief", "seed"):
            finite(f"sampling: {name}", getattr(self, name))
        for name in ("jitters", "powers"):
            if not getattr(self, name):
                fail(f"sampling: {name}", (), "at least one number")
            for value in getattr(self, name):
                finite(f"sampling: {name}", value)
        finite("sampling: weight", self.weight, 0.0, 0.999)
        for name in ("common", "transferred"):
            finite(f"sampling: {name}", getattr(self, name), 0.0, 1.0)


def with_samples(loads: Loads, sampling: Sampling | None = None) -> Loads:
    """The given scenarios and sampled ones, half by a law (eq. 15), half by transferred ranks (eq. 20).

    A law of few parameters gives freedom where the scenarios agree; ranks show what the scenarios' own surprises were,
    without a law. Each sample keeps the layer's mean number of tokens.
    """
    sampling = sampling or Sampling()
    if sampling.count == 0 or sampling.weight == 0:
        return loads
    weight_S = loads.scenario_weights_S
    draw = np.random.default_rng(sampling.seed)
    by_rank = round(sampling.count * sampling.transferred) if len(weight_S) > 1 else 0
    drawn = [_by_law(loads, sampling, sampling.count - by_rank, draw), _by_rank(loads, sampling, by_rank, draw)]
    weights = np.concatenate(
        [weight_S * (1 - sampling.weight), np.full(sampling.count, sampling.weight / sampling.count)]
    )
    sharp_NLE = _sharpened(np.concatenate(drawn), sampling.powers)
    return replace(loads, tokens_SLE=np.concatenate([loads.tokens_SLE, sharp_NLE]), weights_S=weights)


def _sharpened(drawn_NLE: FloatArray, powers: tuple[float, ...]) -> FloatArray:
    """Every sample raised to one of the powers, in turn, with its totals as before."""
    total_NL = drawn_NLE.sum(axis=2, keepdims=True)
    part_NLE = drawn_NLE / np.maximum(drawn_NLE.max(axis=2, keepdims=True), 1e-300)
    raised_NLE = part_NLE ** np.resize(powers, len(drawn_NLE))[:, None, None]
    sharp_NLE: FloatArray = raised_NLE * (total_NL / np.maximum(raised_NLE.sum(axis=2, keepdims=True), 1e-300))
    return sharp_NLE


def _by_law(loads: Loads, sampling: Sampling, count: int, draw: np.random.Generator) -> FloatArray:
    """Eq. 15, shape (count, L, E): experts vary on their own, and together as the scenarios do."""
    weight_S = loads.scenario_weights_S
    log_SLE, total_L = _logarithms(loads, sampling.floor)
    mean_LE = np.tensordot(weight_S, log_SLE, axes=1)
    off_SLE = log_SLE - mean_LE
    known = len(weight_S) - 1
    square_LE = np.tensordot(weight_S, off_SLE**2, axes=1) * len(weight_S)
    sigma_LE = np.sqrt((sampling.belief * sampling.sigma**2 + square_LE) / (sampling.belief + known))
    common = sampling.common if known else 0.0
    noise = _stratified(count, mean_LE.shape, draw) * np.sqrt(1.0 - common) * sigma_LE
    along_S = np.sqrt(common * weight_S * len(weight_S) / max(known, 1))
    noise += np.tensordot(_stratified(count, along_S.shape, draw) * along_S, off_SLE, axes=1)
    drawn: FloatArray = np.exp(mean_LE + noise)
    drawn *= (total_L / drawn.sum(axis=2))[:, :, None]
    return drawn


def _by_rank(loads: Loads, sampling: Sampling, count: int, draw: np.random.Generator) -> FloatArray:
    """Eq. 20, shape (count, L, E): what a scenario held for experts of a rank among the others, for that rank now.

    Training balances experts over all its text, so those that the seen domains leave idle are some other domain's
    specialists: each scenario's busiest experts are often the idlest of the rest, which no law of the means shows.
    """
    weight_S = loads.scenario_weights_S
    _, layers, experts = loads.tokens_SLE.shape
    total_SL = loads.tokens_SLE.sum(axis=2)
    scaled_SLE = loads.tokens_SLE * (weight_S @ total_SL / np.maximum(total_SL, 1e-300))[:, :, None]
    mean_LE = np.tensordot(weight_S, scaled_SLE, axes=1)
    ranked_LE = np.argsort(-mean_LE, axis=1, kind="stable")
    rest_SLE = np.argsort(weight_S[:, None, None] * scaled_SLE - mean_LE, axis=2, kind="stable")
    by_rank_SLE = np.take_along_axis(scaled_SLE, rest_SLE, axis=2)
    sources = np.searchsorted(np.cumsum(weight_S), (np.arange(count) + 0.5) / max(count, 1))
    source_NL = np.stack([draw.permutation(sources) for _ in range(layers)], axis=1)
    scale_N = np.resize(sampling.jitters, count)[:, None, None] * experts
    near = draw.standard_normal((count, layers, experts)) * scale_N + np.arange(experts)
    taken = np.take_along_axis(by_rank_SLE[source_NL, np.arange(layers)], np.argsort(near, axis=2), axis=2)
    drawn = np.empty_like(taken)
    np.put_along_axis(drawn, np.broadcast_to(ranked_LE, taken.shape), taken, axis=2)
    return drawn


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
