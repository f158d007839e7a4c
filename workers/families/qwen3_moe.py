"""Qwen3-MoE (Yang et al. 2025, arXiv 2505.09388): each head's query and key is normalised by itself."""

from __future__ import annotations

from .base import Family, GqaAttention, ModelConfig, Router, TrunkTensor
from .common import (
    QWEN_EXPERTS,
    check_supported,
    embedding_tensors,
    gqa_tensors,
    mlp_tensors,
    norm_tensors,
    one,
    read_dtype,
    read_heads,
    read_rope,
    read_top_k,
)
from .reader import ConfigReader

ARCHITECTURE = "Qwen3MoeForCausalLM"


def read(config: ConfigReader) -> ModelConfig:
    check_supported(config)
    heads, kv_heads, head_dim = read_heads(config)
    experts = config.integer("num_experts", "num_local_experts")
    layers = config.integer("num_hidden_layers")
    moe_layers = _moe_layers(config, layers)
    windowed = config.flag("use_sliding_window", False)
    return ModelConfig(
        family=ARCHITECTURE,
        layers=layers,
        hidden_size=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        attention=GqaAttention(
            heads,
            kv_heads,
            head_dim,
            qk_norm="head",
            sliding_window=config.optional_integer("sliding_window", low=1) if windowed else None,
            bias=config.flag("attention_bias", False),
        ),
        rope=read_rope(config, head_dim, default_theta=1e4),
        router=Router("softmax", read_top_k(config, experts), normalise=config.flag("norm_topk_prob", False)),
        experts=experts,
        expert_intermediate=config.integer("moe_intermediate_size"),
        moe_layers=moe_layers,
        dense_intermediate=config.integer("intermediate_size") if len(moe_layers) < layers else 0,
        shared_intermediate=0,
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        rms_eps=config.number("rms_norm_eps", default=1e-6),
        max_positions=config.integer("max_position_embeddings"),
        dtype=read_dtype(config),
        bos_id=config.optional_integer("bos_token_id"),
        eos_ids=config.integers("eos_token_id"),
    )


def _moe_layers(config: ConfigReader, layers: int) -> tuple[int, ...]:
    """Every ``decoder_sparse_step``-th layer, except ``mlp_only_layers``."""
    step = config.integer("decoder_sparse_step", default=1)
    dense = config.integers("mlp_only_layers")
    return tuple(i for i in range(layers) if (i + 1) % step == 0 and i not in dense)


def trunk(config: ModelConfig) -> dict[str, TrunkTensor]:
    tensors = embedding_tensors(config)
    for layer in range(config.layers):
        tensors |= norm_tensors(config, layer) | gqa_tensors(config, layer)
        mlp = f"model.layers.{layer}.mlp"
        if layer in config.moe_layers:
            tensors[f"{layer}.router"] = one(f"{mlp}.gate.weight", config.experts, config.hidden_size)
        else:
            tensors |= mlp_tensors(config, layer, mlp, config.dense_intermediate)
    return tensors


FAMILY = Family(ARCHITECTURE, read, trunk, QWEN_EXPERTS)
