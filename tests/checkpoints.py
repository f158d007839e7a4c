"""Tiny checkpoints of every family, made with transformers: odd sizes, weights that make greedy decoding lively."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3")
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
VOCAB = 4 + 256 + 7  # special tokens, bytes, and some ids that no text has

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
        },
    ),
    "olmoe": (
        OlmoeConfig,
        OlmoeForCausalLM,
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 24,
            "num_experts": 7,
            "num_experts_per_tok": 3,
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "hidden_size": 40,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 56,
            "moe_intermediate_size": 24,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 72,
            "moe_intermediate_size": 24,
            "n_routed_experts": 6,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "n_group": 3,
            "topk_group": 2,
            "q_lora_rank": 20,
            "kv_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "first_k_dense_replace": 1,
        },
    ),
}


def make_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A transformers model of the family with random float32 weights; ``overrides`` go to its configuration."""
    config_class, model_class, fields = _FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**_SHARED, **fields, **overrides})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(_random(name, tensor.shape, generator))
    return model


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if name.endswith(("bias", "e_score_correction_bias")):
        return 0.1 * noise
    if "embed_tokens" in name:
        return noise
    gain = 2.0 if name.endswith(("gate.weight", "q_proj.weight", "k_proj.weight")) else 1.3
    return noise * gain / shape[-1] ** 0.5  # keeps the residual stream's scale; routers and attention are decided


def make_checkpoint(
    family: str,
    directory: str | Path,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
    stacked: bool = False,
    **overrides: Any,
) -> Path:
    """Write ``config.json``, safetensors and a byte-level tokenizer with a chat template.

    Parameters
    ----------
    family : str
        One of `FAMILIES`.
    max_shard_size : str
        Small ones make several files and an index.
    stacked : bool
        Write each layer's experts as stacked tensors.
    overrides
        Fields of the transformers configuration.
    """
    directory = Path(directory)
    model = make_model(family, seed, **overrides).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size, save_original_format=not stacked)
    make_tokenizer().save_pretrained(directory)
    return directory


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad, unk = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unk
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return fast
