"""Mixtral (Jiang et al. 2024, arXiv 2401.04088)."""

from __future__ import annotations

from .base import ExpertNames, Family, GqaAttention, ModelConfig, Router, TensorSpec, TrunkTensor
from .common import (
    check_supported,
    embedding_tensors,
    gqa_tensors,
    norm_tensors,
    read_dtype,
    read_heads,
    read_rope,
    read_top_k,
)
from .reader import ConfigReader

ARCHITECTURE = "MixtralForCausalLM"


def read(config: ConfigReader) -> ModelConfig:
    check_supported(config)
    heads, kv_heads, head_dim = read_heads(config)
    experts = config.integer("num_local_experts", "num_experts")
    layers = config.integer("num_hidden_layers")
    return ModelConfig(
        family=ARCHITECTURE,
        layers=layers,
        hidden_size=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        attention=GqaAttention(
            heads, kv_heads, head_dim, sliding_window=config.optional_integer("sliding_window", low=1)
        ),
        rope=read_rope(config, head_dim, default_theta=1e6),
        router=Router("softmax", read_top_k(config, experts), normalise=True),
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
        names = f"model.layers.{layer}.block_sparse_moe.gate.weight", f"model.layers.{layer}.mlp.gate.weight"
        router = TensorSpec(names[0], (config.experts, config.hidden_size), alias=names[1])
        tensors[f"{layer}.router"] = TrunkTensor((router,))
    return tensors


FAMILY = Family(
    ARCHITECTURE,
    read,
    trunk,
    ExpertNames(
        gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
        down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        stacked_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
        stacked_down="model.layers.{layer}.mlp.experts.down_proj",
    ),
)
