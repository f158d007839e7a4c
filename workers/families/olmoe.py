"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): queries and keys are normalised over all heads together."""

from __future__ import annotations

from .base import Family, GqaAttention, ModelConfig, Router, TrunkTensor
from .common import (
    QWEN_EXPERTS,
    check_supported,
    embedding_tensors,
    gqa_tensors,
    norm_tensors,
    one,
    read_dtype,
    read_heads,
    read_rope,
    read_top_k,
)
from .reader import ConfigReader

ARCHITECTURE = "OlmoeForCausalLM"


def read(config: ConfigReader) -> ModelConfig:
    check_supported(config)
    heads, kv_heads, head_dim = read_heads(config)
    experts = config.integer("num_experts", "num_local_experts")
    layers = config.integer("num_hidden_layers")
    return ModelConfig(
        family=ARCHITECTURE,
        layers=layers,
        hidden_size=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        attention=GqaAttention(
            heads,
            kv_heads,
            head_dim,
            qk_norm="full",
            clip_qkv=config.optional_number("clip_qkv"),
            bias=config.flag("attention_bias", False),
        ),
        rope=read_rope(config, head_dim, default_theta=1e4),
        router=Router("softmax", read_top_k(config, experts), normalise=config.flag("norm_topk_prob", False)),
        experts=experts,
        expert_intermediate=config.integer("intermediate_size"),
        moe_layers=tuple(range(layers)),
        dense_intermediate=0,
        shared_intermediate=0,
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        rms_eps=config.number("rms_norm_eps", default=1e-5),
        max_positions=config.integer("max_position_embeddings"),
        dtype=read_dtype(config),
        bos_id=config.optional_integer("bos_token_id"),
        eos_ids=config.integers("eos_token_id"),
    )


def trunk(config: ModelConfig) -> dict[str, TrunkTensor]:
    tensors = embedding_tensors(config)
    for layer in range(config.layers):
        tensors |= norm_tensors(config, layer) | gqa_tensors(config, layer)
        gate = f"model.layers.{layer}.mlp.gate.weight"
        tensors[f"{layer}.router"] = one(gate, config.experts, config.hidden_size)
    return tensors


FAMILY = Family(ARCHITECTURE, read, trunk, QWEN_EXPERTS)
