"""DeepSeek-V3 (arXiv 2412.19437): latent attention, shared experts, group-limited sigmoid routing.

The extra layers for multi-token prediction that checkpoints may hold are not used.
"""

from __future__ import annotations

from .base import Family, MlaAttention, ModelConfig, Router, TensorSpec, TrunkTensor
from .common import (
    QWEN_EXPERTS,
    check_supported,
    embedding_tensors,
    mlp_tensors,
    norm_tensors,
    one,
    read_dtype,
    read_rope,
    read_top_k,
)
from .reader import ConfigReader

ARCHITECTURE = "DeepseekV3ForCausalLM"


def read(config: ConfigReader) -> ModelConfig:
    check_supported(config)
    attention = _attention(config)
    experts = config.integer("n_routed_experts", "num_local_experts")
    layers = config.integer("num_hidden_layers")
    dense = min(config.integer("first_k_dense_replace", default=3, low=0), layers)
    width = config.integer("moe_intermediate_size")
    return ModelConfig(
        family=ARCHITECTURE,
        layers=layers,
        hidden_size=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        attention=attention,
        rope=read_rope(
            config, attention.rope_dim, 1e4, config.flag("rope_interleave", True), width_name="qk_rope_head_dim"
        ),
        router=_router(config, experts),
        experts=experts,
        expert_intermediate=width,
        moe_layers=tuple(range(dense, layers)),
        dense_intermediate=config.integer("intermediate_size") if dense else 0,
        shared_intermediate=width * config.integer("n_shared_experts", default=1),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        rms_eps=config.number("rms_norm_eps", default=1e-6),
        max_positions=config.integer("max_position_embeddings"),
        dtype=read_dtype(config),
        bos_id=config.optional_integer("bos_token_id"),
        eos_ids=config.integers("eos_token_id"),
    )


def _attention(config: ConfigReader) -> MlaAttention:
    bias = config.flag("attention_bias", False)
    q_lora_rank = config.optional_integer("q_lora_rank", low=1)
    if bias and q_lora_rank is None:
        raise config.fail("attention_bias", "false where q_lora_rank is null")
    return MlaAttention(
        heads=config.integer("num_attention_heads"),
        q_lora_rank=q_lora_rank,
        kv_lora_rank=config.integer("kv_lora_rank"),
        nope_dim=config.integer("qk_nope_head_dim"),
        rope_dim=config.integer("qk_rope_head_dim"),
        v_dim=config.integer("v_head_dim"),
        bias=bias,
    )


def _router(config: ConfigReader, experts: int) -> Router:
    for name, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if config.get(name) not in (None, value):
            raise config.fail(name, repr(value))
    groups = config.integer("n_group")
    if experts % groups or experts // groups < 2:
        raise config.fail("n_group", f"a divisor of n_routed_experts ({experts}) that leaves groups of 2 or more")
    topk_groups = config.integer("topk_group")
    if topk_groups > groups:
        raise config.fail("topk_group", f"at most n_group ({groups})")
    return Router(
        kind="sigmoid",
        top_k=read_top_k(config, topk_groups * (experts // groups)),
        normalise=config.flag("norm_topk_prob", True),
        groups=groups,
        topk_groups=topk_groups,
        scale=config.number("routed_scaling_factor", default=1.0),
    )


def trunk(config: ModelConfig) -> dict[str, TrunkTensor]:
    tensors = embedding_tensors(config)
    for layer in range(config.layers):
        tensors |= norm_tensors(config, layer) | _mla_tensors(config, layer)
        mlp = f"model.layers.{layer}.mlp"
        if layer not in config.moe_layers:
            tensors |= mlp_tensors(config, layer, mlp, config.dense_intermediate)
            continue
        E, H = config.experts, config.hidden_size
        tensors[f"{layer}.router"] = one(f"{mlp}.gate.weight", E, H, dtype="float32")
        tensors[f"{layer}.router_bias"] = one(f"{mlp}.gate.e_score_correction_bias", E, dtype="float32")
        tensors |= mlp_tensors(config, layer, f"{mlp}.shared_experts", config.shared_intermediate)
    return tensors


def _mla_tensors(config: ModelConfig, layer: int) -> dict[str, TrunkTensor]:
    """``qkv_a`` is [first query projection; latent and rope key], so that one multiplication does both."""
    a, p = config.attention, f"model.layers.{layer}.self_attn"
    assert isinstance(a, MlaAttention)
    H, q_rows = config.hidden_size, a.heads * (a.nope_dim + a.rope_dim)
    q_name, q_a_rows = ("q_proj", q_rows) if a.q_lora_rank is None else ("q_a_proj", a.q_lora_rank)
    rows = {q_name: q_a_rows, "kv_a_proj_with_mqa": a.kv_lora_rank + a.rope_dim}
    tensors = {
        "qkv_a": TrunkTensor(tuple(TensorSpec(f"{p}.{n}.weight", (r, H)) for n, r in rows.items())),
        "kv_a_norm": one(f"{p}.kv_a_layernorm.weight", a.kv_lora_rank),
        "kv_b": one(f"{p}.kv_b_proj.weight", a.heads * (a.nope_dim + a.v_dim), a.kv_lora_rank),
        "o": one(f"{p}.o_proj.weight", H, a.heads * a.v_dim),
    }
    if a.q_lora_rank is not None:
        tensors["q_a_norm"] = one(f"{p}.q_a_layernorm.weight", a.q_lora_rank)
        tensors["q_b"] = one(f"{p}.q_b_proj.weight", q_rows, a.q_lora_rank)
    if a.bias:
        tensors["qkv_a_bias"] = TrunkTensor(tuple(TensorSpec(f"{p}.{n}.bias", (r,)) for n, r in rows.items()))
        tensors["o_bias"] = one(f"{p}.o_proj.bias", H)
    return {f"{layer}.{name}": tensor for name, tensor in tensors.items()}


FAMILY = Family(ARCHITECTURE, read, trunk, QWEN_EXPERTS)
