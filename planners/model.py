"""What a model's MoE layers weigh and how their experts are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .fields import FloatArray, fail, finite, frozen_array, positive


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """The MoE layers of a model.

    Parameters
    ----------
    layers, experts : int
        MoE layers, and logical routed experts per layer.
    expert_bytes : float, or numbers of shape (L,) or (L, E)
        Weight bytes of one routed expert.
    flops_per_token : float
        Operations of one routed expert for one token (6 x hidden x intermediate for a gated one).
    hidden_bytes : float
        Bytes of one token's hidden state on the wire.
    top_k : int
        Routed experts per token.
    shared_bytes : float
        Bytes of the shared experts of one layer; every device holds them.
    shared_flops_per_token : float
        Operations of a layer's shared experts for one token, done where the token lives.
    """

    layers: int
    experts: int
    expert_bytes: Any
    flops_per_token: float
    hidden_bytes: float = 0.0
    top_k: int = 1
    shared_bytes: float = 0.0
    shared_flops_per_token: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layers", "experts", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                fail(f"model: {name}", value, "an integer >= 1")
        if self.top_k > self.experts:
            fail("model: top_k", self.top_k, f"at most experts ({self.experts})")
        positive("model: flops_per_token", self.flops_per_token)
        for name in ("hidden_bytes", "shared_bytes", "shared_flops_per_token"):
            finite(f"model: {name}", getattr(self, name))
        if (self.bytes_LE <= 0).any():
            fail("model: expert_bytes", self.expert_bytes, "numbers above 0")

    @cached_property
    def bytes_LE(self) -> FloatArray:
        """Weight bytes of every routed expert."""
        given = np.asarray(self.expert_bytes, dtype=np.float64)
        shape = (self.layers, self.experts)
        if given.shape not in ((), (self.layers,), shape):
            fail("model: expert_bytes", f"shape {given.shape}", f"a number, ({self.layers},) or {shape}")
        wide = given[:, None] if given.ndim == 1 else given
        return frozen_array("model: expert_bytes", np.broadcast_to(wide, shape), 2)


@dataclass(frozen=True, eq=False)
class Loads:
    """Tokens per expert, in one or several scenarios (windows of time, domains of text).

    Parameters
    ----------
    tokens_SLE : numbers of shape (scenarios, layers, experts) or (layers, experts)
        Tokens per step that choose the expert.
    weights_S : numbers of shape (scenarios,), optional
        Relative weight of each scenario; equal if not given. Normalised to sum 1.
    pairs_PEE : numbers of shape (layers - 1, experts, experts), optional
        ``pairs_PEE[l, a, b]``: how often a token of expert a in layer l goes to b in layer l + 1 (any scale). Given,
        tokens are taken to stay where their last expert ran (eq. 5); otherwise they return home after each layer.
    """

    tokens_SLE: FloatArray
    weights_S: FloatArray | None = None
    pairs_PEE: FloatArray | None = None

    def __post_init__(self) -> None:
        dims = np.ndim(self.tokens_SLE)
        tokens = frozen_array("loads: tokens_SLE", self.tokens_SLE, 2 if dims == 2 else 3)
        tokens = tokens[None] if dims == 2 else tokens
        count = len(tokens)
        weights = frozen_array("loads: weights_S", np.ones(count) if self.weights_S is None else self.weights_S, 1)
        if weights.shape != (count,) or weights.sum() <= 0:
            fail("loads: weights_S", weights, f"{count} numbers with a positive sum")
        object.__setattr__(self, "tokens_SLE", tokens)
        object.__setattr__(self, "weights_S", frozen_array("loads: weights_S", weights / weights.sum(), 1))
        if self.pairs_PEE is not None:
            self._set_pairs()

    def _set_pairs(self) -> None:
        _, layers, experts = self.tokens_SLE.shape
        pairs = frozen_array("loads: pairs_PEE", self.pairs_PEE, 3)
        if pairs.shape != (layers - 1, experts, experts):
            fail("loads: pairs_PEE", f"shape {pairs.shape}", f"({layers - 1}, {experts}, {experts})")
        object.__setattr__(self, "pairs_PEE", pairs)

    @cached_property
    def scenario_weights_S(self) -> FloatArray:
        """Weights that sum to 1."""
        assert self.weights_S is not None
        return self.weights_S

    @cached_property
    def mean_LE(self) -> FloatArray:
        """Tokens averaged over scenarios by weight."""
        return np.tensordot(self.scenario_weights_S, self.tokens_SLE, axes=1)
