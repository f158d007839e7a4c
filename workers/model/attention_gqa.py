"""Grouped-query attention of one layer. Shapes: T new tokens, h heads, D head width, S sequences, L keys."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.linear import linear
from ...kernels.norm import rms_norm
from ..families.base import GqaAttention, ModelConfig
from .kv import KVCache
from .plan import AttentionPlan, DecodeGroup, Prefill
from .rope import RopeTable


class GqaLayer:
    """Project, normalise, rotate, store KV, attend.

    Parameters
    ----------
    tensors : mapping
        The layer's trunk tensors: ``qkv`` and, as the configuration has it, ``qkv_bias``, ``q_norm``, ``k_norm``.
    """

    def __init__(self, config: ModelConfig, layer: int, tensors: Mapping[str, Tensor], rope: RopeTable) -> None:
        attention = config.attention
        assert isinstance(attention, GqaAttention)
        self._a, self._layer, self._rope, self._eps = attention, layer, rope, config.rms_eps
        self._qkv, self._bias = tensors["qkv"], tensors.get("qkv_bias")
        self._q_norm, self._k_norm = tensors.get("q_norm"), tensors.get("k_norm")
        self._scale = attention.head_dim**-0.5
        if attention.qk_norm == "head":  # one weight per head and dimension, so that q and k are scaled together
            heads = (attention.heads, attention.kv_heads)
            norms = (tensors["q_norm"], tensors["k_norm"])
            self._qk_norm = torch.cat([w.expand(n, -1) for n, w in zip(heads, norms, strict=True)])

    def __call__(self, x_TH: Tensor, tables: tuple[Tensor, Tensor], plan: AttentionPlan, kv: KVCache) -> Tensor:
        """The heads' outputs side by side, [T, heads * D], before the output projection."""
        a, T = self._a, x_TH.shape[0]
        qkv_ThD = self._project(x_TH).view(T, a.heads + 2 * a.kv_heads, a.head_dim)
        qk_ThD = qkv_ThD[:, : a.heads + a.kv_heads]
        if a.qk_norm == "head":
            qk_ThD.copy_(rms_norm(qk_ThD, None, self._eps).mul_(self._qk_norm))
        self._rope.rotate_(qk_ThD, tables)
        kv.write(self._layer, plan.blocks_T, plan.places_T, qkv_ThD[:, a.heads :].flatten(1))
        return self._attend(qkv_ThD, plan, kv)

    def _project(self, x_TH: Tensor) -> Tensor:
        a = self._a
        qkv = linear(x_TH, self._qkv, self._bias)
        if a.qk_norm == "full":
            q_end, k_end = a.heads * a.head_dim, (a.heads + a.kv_heads) * a.head_dim
            q, k = qkv[:, :q_end], qkv[:, q_end:k_end]
            q.copy_(rms_norm(q, self._q_norm, self._eps))
            k.copy_(rms_norm(k, self._k_norm, self._eps))
        return qkv if a.clip_qkv is None else qkv.clamp_(-a.clip_qkv, a.clip_qkv)

    def _attend(self, qkv_ThD: Tensor, plan: AttentionPlan, kv: KVCache) -> Tensor:
        if not plan.prefills and len(plan.decodes) == 1:
            return self._decode(qkv_ThD, plan.decodes[0], kv)
        out = qkv_ThD.new_empty(qkv_ThD.shape[0], self._a.heads * self._a.head_dim)
        for prefill in plan.prefills:
            out[prefill.begin : prefill.end] = self._prefill(qkv_ThD, prefill, kv)
        for group in plan.decodes:
            out[group.rows_S] = self._decode(qkv_ThD[group.rows_S], group, kv)
        return out

    def _decode(self, qkv_ShD: Tensor, group: DecodeGroup, kv: KVCache) -> Tensor:
        """Query heads that share a key head are that head's queries; so no key is repeated."""
        a, S = self._a, qkv_ShD.shape[0]
        q = qkv_ShD[:, : a.heads].view(S, a.kv_heads, -1, a.head_dim)
        k, v = self._split(kv.gather(self._layer, group.tables_SB))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=group.mask_S11L, scale=self._scale)
        return out.reshape(S, -1)

    def _prefill(self, qkv_ThD: Tensor, prefill: Prefill, kv: KVCache) -> Tensor:
        a, rows = self._a, slice(prefill.begin, prefill.end)
        q = qkv_ThD[rows, : a.heads].transpose(0, 1).unsqueeze(0)
        if prefill.context:
            length = prefill.context + prefill.end - prefill.begin
            k, v = self._split(kv.gather(self._layer, prefill.table_1B)[:, :length])
        else:
            k, v = self._split(qkv_ThD[rows, a.heads :].flatten(1).unsqueeze(0))
        causal = prefill.mask_NL is None
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=prefill.mask_NL, is_causal=causal, scale=self._scale, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)

    def _split(self, kv_SLW: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [S, kv heads, L, D], of cache entries."""
        parts = kv_SLW.view(*kv_SLW.shape[:2], 2, self._a.kv_heads, self._a.head_dim)
        return parts[:, :, 0].transpose(1, 2), parts[:, :, 1].transpose(1, 2)
