"""The decoder of every family: attention, then experts or a dense MLP, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.linear import add_linear, linear
from ...kernels.moe import silu_mul
from ...kernels.norm import rms_norm
from ...kernels.routing import sigmoid_group_top_k, softmax_top_k
from ..families.base import GqaAttention, ModelConfig
from .attention_gqa import GqaLayer
from .attention_mla import MlaLayer
from .batch import Batch
from .experts import Experts
from .kv import KVCache
from .plan import PlanRules, make_plan
from .rope import rope_table


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's tensors. ``moe`` counts MoE layers; None: dense."""

    attention: GqaLayer | MlaLayer
    attention_norm: Tensor
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    moe: int | None
    router: Tensor | None
    router_bias: Tensor | None
    gate_up: Tensor | None
    down: Tensor | None


class Decoder:
    """Turns batches of tokens into logits.

    Parameters
    ----------
    trunk : mapping
        The tensors `families.layout.trunk_layout` names, all on one device; they are read, never copied.
    experts : Experts
        Computes the routed experts. `forward` calls it for each MoE layer in order, whatever the batch.
    """

    def __init__(self, config: ModelConfig, trunk: Mapping[str, Tensor], experts: Experts) -> None:
        self.config, self.experts = config, experts
        self._embed, self._norm = trunk["embed"], trunk["norm"]
        self._head = trunk.get("head", self._embed)
        self.dtype, self.device = self._embed.dtype, self._embed.device
        self._rope = rope_table(config.rope, self.dtype, self.device)
        moe = {layer: m for m, layer in enumerate(config.moe_layers)}
        self._layers = [self._layer(i, moe.get(i), trunk) for i in range(config.layers)]

    def _layer(self, layer: int, moe: int | None, trunk: Mapping[str, Tensor]) -> _Layer:
        prefix = f"{layer}."
        t = {name.removeprefix(prefix): v for name, v in trunk.items() if name.startswith(prefix)}
        kind = GqaLayer if isinstance(self.config.attention, GqaAttention) else MlaLayer
        return _Layer(
            attention=kind(self.config, layer, t, self._rope),
            attention_norm=t["attention_norm"],
            out=t["o"],
            out_bias=t.get("o_bias"),
            mlp_norm=t["mlp_norm"],
            moe=moe,
            router=t.get("router"),
            router_bias=t.get("router_bias"),
            gate_up=t.get("gate_up"),
            down=t.get("down"),
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Run the batch, store its KV, and return float32 logits [rows wanted, vocabulary].

        With no tokens, only the experts of every MoE layer are called (with no tokens), for the other workers' sake.
        """
        if batch.tokens == 0:
            return self._idle()
        positions_T = batch.positions_T.to(self.device)
        attention = self.config.attention
        window = attention.sliding_window if isinstance(attention, GqaAttention) else None
        plan = make_plan(batch, positions_T, PlanRules(kv.block_tokens, window, self.dtype, self.device))
        if plan.fresh:
            kv.clear(plan.fresh)
        tables = self._rope.at(positions_T, batch.longest)
        x_TH = functional.embedding(batch.token_ids_T.to(self.device), self._embed)
        eps = self.config.rms_eps
        for layer in self._layers:
            seen = layer.attention(rms_norm(x_TH, layer.attention_norm, eps), tables, plan, kv)
            x_TH = add_linear(x_TH, seen, layer.out)
            if layer.out_bias is not None:
                x_TH += layer.out_bias
            x_TH = self._mlp(layer, x_TH, rms_norm(x_TH, layer.mlp_norm, eps))
        return self._logits(x_TH, batch)

    def _mlp(self, layer: _Layer, x_TH: Tensor, h_TH: Tensor) -> Tensor:
        """``x`` plus the experts' and the dense or shared MLP's contribution."""
        if layer.moe is not None:
            x_TH = x_TH + self.experts(layer.moe, h_TH, *self._route(layer, h_TH))
        if layer.gate_up is not None and layer.down is not None:
            x_TH = add_linear(x_TH, silu_mul(linear(h_TH, layer.gate_up)), layer.down)
        return x_TH

    def _route(self, layer: _Layer, h_TH: Tensor) -> tuple[Tensor, Tensor]:
        router = self.config.router
        assert layer.router is not None
        logits_TE = linear(h_TH.to(layer.router.dtype), layer.router)
        if router.kind == "softmax":
            return softmax_top_k(logits_TE, router.top_k, router.normalise)
        assert layer.router_bias is not None
        ids_TK, weights_TK = sigmoid_group_top_k(
            logits_TE, layer.router_bias, router.top_k, router.groups, router.topk_groups, router.normalise
        )
        return ids_TK, weights_TK * router.scale

    def _logits(self, x_TH: Tensor, batch: Batch) -> Tensor:
        if list(batch.logits_rows) != list(range(batch.tokens)):
            rows_R = torch.tensor(batch.logits_rows, dtype=torch.int64, device=self.device)
            x_TH = x_TH.index_select(0, rows_R)
        return linear(rms_norm(x_TH, self._norm, self.config.rms_eps), self._head).float()

    def _idle(self) -> Tensor:
        nothing = torch.empty(0, self.config.hidden_size, dtype=self.dtype, device=self.device)
        ids = torch.empty(0, self.config.top_k, dtype=torch.int64, device=self.device)
        weights = torch.empty(0, self.config.top_k, dtype=torch.float32, device=self.device)
        for moe_layer in range(len(self.config.moe_layers)):
            self.experts(moe_layer, nothing, ids, weights)
        return torch.empty(0, self.config.vocab_size, dtype=torch.float32, device=self.device)
