"""Multi-head latent attention of one layer (arXiv 2405.04434, section 2.1).

The cache holds one latent c and one rotated key per token. Prefill expands latents to keys and values of every head.
Decode never does: a head's score q . (W_uk c) is (W_uk^T q) . c and its output W_uv (sum p c), so all heads attend to
the latents themselves.

Shapes: T new tokens, h heads, S sequences, L keys, C latent width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.linear import linear
from ...kernels.norm import rms_norm
from ..families.base import MlaAttention, ModelConfig, Rope
from .kv import KVCache
from .plan import AttentionPlan, DecodeGroup, Prefill
from .rope import RopeTable, yarn_mscale


def softmax_scale(attention: MlaAttention, rope: Rope) -> float:
    """1 / sqrt(head width), times YaRN's temperature squared where the checkpoint asks for it."""
    scale: float = (attention.nope_dim + attention.rope_dim) ** -0.5
    if rope.scaling is not None and rope.scaling.mscale_all_dim:
        scale *= yarn_mscale(rope.scaling.factor, rope.scaling.mscale_all_dim) ** 2
    return scale


class MlaLayer:
    """Project to latents, rotate, store, attend.

    Parameters
    ----------
    tensors : mapping
        The layer's trunk tensors: ``qkv_a``, ``kv_a_norm``, ``kv_b`` and, as the configuration has it,
        ``qkv_a_bias``, ``q_a_norm``, ``q_b``.
    """

    def __init__(self, config: ModelConfig, layer: int, tensors: Mapping[str, Tensor], rope: RopeTable) -> None:
        attention = config.attention
        assert isinstance(attention, MlaAttention)
        self._a, self._layer, self._rope = attention, layer, rope
        self._qkv_a, self._bias = tensors["qkv_a"], tensors.get("qkv_a_bias")
        self._q_norm, self._q_b = tensors.get("q_a_norm"), tensors.get("q_b")
        self._kv_norm, self._kv_b = tensors["kv_a_norm"], tensors["kv_b"]
        up = self._kv_b.view(attention.heads, -1, attention.kv_lora_rank)
        self._key_up, self._value_up = up[:, : attention.nope_dim], up[:, attention.nope_dim :]
        self._scale = softmax_scale(attention, config.rope)

    def __call__(self, x_TH: Tensor, tables: tuple[Tensor, Tensor], plan: AttentionPlan, kv: KVCache) -> Tensor:
        """The heads' outputs side by side, [T, heads * v_dim], before the output projection."""
        a = self._a
        mixed = linear(x_TH, self._qkv_a, self._bias)
        entry_TW = mixed[:, -(a.kv_lora_rank + a.rope_dim) :]
        q_ThD = self._queries(mixed[:, : -(a.kv_lora_rank + a.rope_dim)])
        latent = entry_TW[:, : a.kv_lora_rank]
        latent.copy_(rms_norm(latent, self._kv_norm, a.norm_eps))
        self._rope.rotate_(entry_TW[:, None, a.kv_lora_rank :], tables)
        self._rope.rotate_(q_ThD[..., a.nope_dim :], tables)
        kv.write(self._layer, plan.blocks_T, plan.places_T, entry_TW)
        return self._attend(q_ThD, entry_TW, plan, kv)

    def _queries(self, q_TR: Tensor) -> Tensor:
        a = self._a
        q = q_TR
        if self._q_b is not None:
            q = linear(rms_norm(q_TR, self._q_norm, a.norm_eps), self._q_b)
        return q.reshape(-1, a.heads, a.nope_dim + a.rope_dim)

    def _attend(self, q_ThD: Tensor, entry_TW: Tensor, plan: AttentionPlan, kv: KVCache) -> Tensor:
        if not plan.prefills and len(plan.decodes) == 1:
            return self._decode(q_ThD, plan.decodes[0], kv)
        out = q_ThD.new_empty(q_ThD.shape[0], self._a.heads * self._a.v_dim)
        for prefill in plan.prefills:
            rows = slice(prefill.begin, prefill.end)
            seen_LW = entry_TW[rows]
            if prefill.context:
                length = prefill.context + prefill.end - prefill.begin
                seen_LW = kv.gather(self._layer, prefill.table_1B)[0, :length]
            out[rows] = self._prefill(q_ThD[rows], seen_LW, prefill)
        for group in plan.decodes:
            out[group.rows_S] = self._decode(q_ThD[group.rows_S], group, kv)
        return out

    def _decode(self, q_ShD: Tensor, group: DecodeGroup, kv: KVCache) -> Tensor:
        """All heads are queries of one key head: latent and rope key. Its values are the latents."""
        a = self._a
        q_nope, q_rope = torch.split(q_ShD, [a.nope_dim, a.rope_dim], dim=-1)
        q_latent = torch.bmm(q_nope.transpose(0, 1), self._key_up).transpose(0, 1)
        q_S1hW = torch.cat((q_latent, q_rope), dim=-1).unsqueeze(1)
        seen_S1LW = kv.gather(self._layer, group.tables_SB).unsqueeze(1)
        # Values of the keys' width keep the fused kernel; the rope part of the result is thrown away.
        mixed = functional.scaled_dot_product_attention(
            q_S1hW, seen_S1LW, seen_S1LW, attn_mask=group.mask_S11L, scale=self._scale
        )
        latent_hSC = mixed[:, 0, :, : a.kv_lora_rank].transpose(0, 1)
        return torch.bmm(latent_hSC, self._value_up.transpose(1, 2)).transpose(0, 1).flatten(1)

    def _prefill(self, q_NhD: Tensor, seen_LW: Tensor, prefill: Prefill) -> Tensor:
        a = self._a
        latent, rope_key = torch.split(seen_LW, [a.kv_lora_rank, a.rope_dim], dim=-1)
        up = linear(latent, self._kv_b).view(latent.shape[0], a.heads, -1)
        k_nope, v = torch.split(up, [a.nope_dim, a.v_dim], dim=-1)
        k = torch.cat((k_nope, rope_key.unsqueeze(1).expand(-1, a.heads, -1)), dim=-1)
        # Equal widths keep SDPA's fused kernel, which never holds all scores.
        v = functional.pad(v, (0, max(0, k.shape[-1] - a.v_dim)))
        causal = prefill.mask_NL is None
        q_1hND, k_1hLD, v_1hLV = (t.transpose(0, 1).unsqueeze(0) for t in (q_NhD, k, v))
        out = functional.scaled_dot_product_attention(
            q_1hND, k_1hLD, v_1hLV, attn_mask=prefill.mask_NL, is_causal=causal, scale=self._scale
        )
        return out[0, ..., : a.v_dim].transpose(0, 1).flatten(1)
