"""Fields and tensor names that several families share, in Hugging Face's spelling."""

from __future__ import annotations

from typing import Any

from .base import DTYPE_BYTES, ExpertNames, GqaAttention, ModelConfig, Rope, RopeScaling, TensorSpec, TrunkTensor
from .reader import ConfigReader

QWEN_EXPERTS = ExpertNames(
    gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
    stacked_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
    stacked_down="model.layers.{layer}.mlp.experts.down_proj",
)


def read_dtype(config: ConfigReader) -> str:
    """Checkpoint data type: ``dtype`` (transformers 5) or ``torch_dtype``; float32 where neither is given."""
    value = config.get("dtype", "torch_dtype") or "float32"
    if value not in DTYPE_BYTES:
        name = "dtype" if config.get("dtype") else "torch_dtype"
        raise config.fail(name, f"one of {', '.join(DTYPE_BYTES)}")
    return str(value)


def check_supported(config: ConfigReader) -> None:
    """Refuse what no family here implements: other activations, quantised weights."""
    if (config.get("hidden_act") or "silu") != "silu":
        raise config.fail("hidden_act", "'silu'")
    if config.get("quantization_config") is not None:
        raise config.fail("quantization_config", "unquantised weights (no such field)")


def read_rope(
    config: ConfigReader, width: int, default_theta: float, interleaved: bool = False, width_name: str = "head_dim"
) -> Rope:
    """Rotary embedding from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before).

    ``width`` is what can be rotated of a head, from field ``width_name``.

    Raises
    ------
    OperatorError
        An unknown rope type, a factor that is missing or malformed, an odd or empty rotated width.
    """
    fields = config.child("rope_parameters" if config.get("rope_parameters") else "rope_scaling")
    theta = config.number("rope_theta", default=default_theta)
    theta = fields.number("rope_theta", default=theta)
    part = config.number("partial_rotary_factor", default=1.0)
    part = fields.number("partial_rotary_factor", default=part)
    dims = int(width * part)
    if dims < 2 or dims % 2 or dims > width:
        name = width_name if part == 1 else "partial_rotary_factor"
        raise config.fail(name, f"an even number of rotated dimensions, at most the width of {width}; {dims} follow")
    return Rope(theta, dims, interleaved, _read_scaling(config, fields))


def _read_scaling(config: ConfigReader, fields: ConfigReader) -> RopeScaling | None:
    kind: Any = fields.get("rope_type", "type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise fields.fail("rope_type", "one of default, linear, llama3, yarn")
    longest = config.integer("max_position_embeddings")
    original = fields.integer("original_max_position_embeddings", default=longest)
    original = config.integer("original_max_position_embeddings", default=original)
    stretched = longest / original if kind == "yarn" and fields.get("factor") is None else None
    return RopeScaling(
        kind=kind,
        factor=fields.number("factor") if stretched is None else stretched,
        original_max_positions=original,
        low_freq_factor=fields.number("low_freq_factor") if kind == "llama3" else 1.0,
        high_freq_factor=fields.number("high_freq_factor") if kind == "llama3" else 4.0,
        beta_fast=fields.number("beta_fast", default=32.0),
        beta_slow=fields.number("beta_slow", default=1.0),
        attention_factor=fields.optional_number("attention_factor"),
        mscale=fields.number("mscale", default=0.0, positive=False) or None,
        mscale_all_dim=fields.number("mscale_all_dim", default=0.0, positive=False) or None,
        truncate=fields.flag("truncate", True),
    )


def read_heads(config: ConfigReader, default_kv_heads: int | None = None) -> tuple[int, int, int]:
    """Query heads, key/value heads and head width; the checks every grouped-query family needs."""
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", default=default_kv_heads or heads)
    if heads % kv_heads:
        raise config.fail("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    hidden = config.integer("hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise config.fail("hidden_size", f"a multiple of num_attention_heads ({heads}), or a head_dim")
    return heads, kv_heads, config.integer("head_dim", default=hidden // heads)


def read_top_k(config: ConfigReader, experts: int, default: int | None = None) -> int:
    """``num_experts_per_tok``, at most the number of experts."""
    top_k = config.integer("num_experts_per_tok", default=default)
    if top_k > experts:
        raise config.fail("num_experts_per_tok", f"at most the number of experts ({experts})")
    return top_k


def embedding_tensors(config: ModelConfig) -> dict[str, TrunkTensor]:
    """``embed``, ``norm`` and, unless tied to the embedding, ``head``."""
    V, H = config.vocab_size, config.hidden_size
    tensors = {"embed": one("model.embed_tokens.weight", V, H), "norm": one("model.norm.weight", H)}
    if not config.tie_word_embeddings:
        tensors["head"] = one("lm_head.weight", V, H)
    return tensors


def norm_tensors(config: ModelConfig, layer: int) -> dict[str, TrunkTensor]:
    """The two norms of a decoder layer."""
    p, H = f"model.layers.{layer}", config.hidden_size
    return {
        f"{layer}.attention_norm": one(f"{p}.input_layernorm.weight", H),
        f"{layer}.mlp_norm": one(f"{p}.post_attention_layernorm.weight", H),
    }


def gqa_tensors(config: ModelConfig, layer: int) -> dict[str, TrunkTensor]:
    """Grouped-query attention: ``qkv`` is [q; k; v], so that one multiplication projects all three."""
    a, p = config.attention, f"model.layers.{layer}.self_attn"
    assert isinstance(a, GqaAttention)
    rows = {"q": a.heads * a.head_dim, "k": a.kv_heads * a.head_dim, "v": a.kv_heads * a.head_dim}
    H = config.hidden_size
    tensors = {
        "qkv": TrunkTensor(tuple(TensorSpec(f"{p}.{n}_proj.weight", (r, H)) for n, r in rows.items())),
        "o": one(f"{p}.o_proj.weight", H, rows["q"]),
    }
    if a.bias:
        tensors["qkv_bias"] = TrunkTensor(tuple(TensorSpec(f"{p}.{n}_proj.bias", (r,)) for n, r in rows.items()))
        tensors["o_bias"] = one(f"{p}.o_proj.bias", H)
    if a.qk_norm != "none":
        for n in ("q", "k"):
            tensors[f"{n}_norm"] = one(f"{p}.{n}_norm.weight", a.head_dim if a.qk_norm == "head" else rows[n])
    return {f"{layer}.{name}": tensor for name, tensor in tensors.items()}


def mlp_tensors(config: ModelConfig, layer: int, prefix: str, width: int) -> dict[str, TrunkTensor]:
    """A dense or shared gated MLP: ``gate_up`` is [gate; up]."""
    H = config.hidden_size
    gate_up = tuple(TensorSpec(f"{prefix}.{n}_proj.weight", (width, H)) for n in ("gate", "up"))
    return {
        f"{layer}.gate_up": TrunkTensor(gate_up),
        f"{layer}.down": one(f"{prefix}.down_proj.weight", H, width),
    }


def one(name: str, *shape: int, dtype: str | None = None) -> TrunkTensor:
    """A trunk tensor that is a single checkpoint tensor."""
    return TrunkTensor((TensorSpec(name, shape),), dtype)
