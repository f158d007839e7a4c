"""A trained decoder as a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .config import ModelShape
from .files import replace_file, write_json
from .functions import paired_rows
from .model import Decoder, Layer
from .tokenizer import tokenizer_config, tokenizer_json
from .tokens import EOS, PAD, VOCAB

WEIGHTS = "model.safetensors"
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", WEIGHTS, "config.json")


def write_checkpoint(model: Decoder, out: Path) -> None:
    """Write tokenizer, weights (fp32) and config into ``out``; ``config.json`` comes last: with it all are there."""
    write_json(out / "tokenizer.json", tokenizer_json())
    write_json(out / "tokenizer_config.json", tokenizer_config(model.shape.max_positions))
    write_json(out / "generation_config.json", {"eos_token_id": EOS, "pad_token_id": PAD})
    tensors = checkpoint_tensors(model)
    replace_file(out / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(out / "config.json", checkpoint_config(model.shape))


def checkpoint_config(shape: ModelShape) -> dict[str, Any]:
    """Content of ``config.json``."""
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "vocab_size": VOCAB,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.expert_hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": shape.norm_topk,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.rms_eps,
        "rope_theta": shape.rope_theta,
        "attention_bias": False,
        "clip_qkv": None,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "float32",
    }


def checkpoint_tensors(model: Decoder) -> dict[str, Tensor]:
    """Tensors by the names of published OLMoE checkpoints, one per expert and projection."""
    tensors = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        named = {**_attention(layer), **_moe(layer)}
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in named.items()}
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def _attention(layer: Layer) -> dict[str, Tensor]:
    """Query and key rows go from neighbouring pairs to halves, the order of a checkpoint's rotary embedding."""
    a = layer.attention
    width = a.heads * a.head_dim
    q, k, v = torch.split(a.qkv_proj.weight, [width, a.kv_width, a.kv_width])
    q_rows, k_rows = paired_rows(a.heads, a.head_dim), paired_rows(a.kv_heads, a.head_dim)
    return {
        "self_attn.q_proj.weight": q[q_rows],
        "self_attn.k_proj.weight": k[k_rows],
        "self_attn.v_proj.weight": v,
        "self_attn.o_proj.weight": a.o_proj.weight,
        "self_attn.q_norm.weight": a.q_norm.weight[q_rows],
        "self_attn.k_norm.weight": a.k_norm.weight[k_rows],
        "input_layernorm.weight": layer.input_norm.weight,
        "post_attention_layernorm.weight": layer.post_norm.weight,
    }


def _moe(layer: Layer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"mlp.gate.weight": layer.moe.router}
    for e, (gate_up_GD, down_DI) in enumerate(zip(layer.moe.gate_up, layer.moe.down, strict=True)):
        gate_ID, up_ID = gate_up_GD.chunk(2)
        projections = {"gate_proj": gate_ID, "up_proj": up_ID, "down_proj": down_DI}
        tensors |= {f"mlp.experts.{e}.{name}.weight": tensor for name, tensor in projections.items()}
    return tensors
