"""What elasticity is measured on: the demo's checkpoint, or one of its shape, and a large OLMoE with random weights.

Large: 3 layers of 64 experts, 8 serve a token, 2048 wide with inner width 1024 as OLMoE-1B-7B's, vocabulary 2048,
bfloat16; 2.4 GB. Only the engines are measured, so that no tokenizer is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

DEMO = Path(".demo/checkpoint")


@dataclass(frozen=True)
class Shape:
    """Sizes of an OLMoE. ``kv_heads`` and ``heads`` have ``hidden / heads`` dimensions each."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    experts: int
    top_k: int
    inner: int
    vocabulary: int
    dtype: torch.dtype

    @property
    def config(self) -> dict[str, object]:
        return {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "intermediate_size": self.inner,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
        }


DEMO_SHAPE = Shape(4, 128, 2, 2, 8, 2, 192, 260, torch.float32)
LARGE_SHAPE = Shape(3, 2048, 16, 16, 64, 8, 1024, 2048, torch.bfloat16)


def demo_checkpoint(folder: Path) -> tuple[Path, str]:
    """The demo's checkpoint if it has been trained, else one of its shape in ``folder``; and which it is, in words."""
    if (DEMO / "model.safetensors").exists():
        return DEMO.resolve(), "the demo's, trained"
    return ensure_olmoe(folder / "demo", DEMO_SHAPE), "of the demo's shape, random weights (make demo trains it)"


def large_checkpoint(folder: Path) -> tuple[Path, str]:
    """At least 2 GiB of random weights, in ``folder``; and what it is, in words."""
    return ensure_olmoe(folder / "large", LARGE_SHAPE), "OLMoE-1B-7B's layers, 3 of 16, random weights"


def weight_bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def ensure_olmoe(folder: Path, shape: Shape) -> Path:
    """Write the checkpoint unless one is there; a file per layer, so that little memory is needed."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, sizes in enumerate([_outer(shape), *(_layer(shape, layer) for layer in range(shape.layers))]):
        file = f"model-{number}.safetensors"
        save_file({name: _random(name, size, shape.dtype, generator) for name, size in sizes.items()}, folder / file)
        files |= dict.fromkeys(sizes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps(shape.config))  # last: it says that all is there
    return folder


def _outer(shape: Shape) -> dict[str, tuple[int, ...]]:
    vocabulary = (shape.vocabulary, shape.hidden)
    return {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (shape.hidden,), "lm_head.weight": vocabulary}


def _layer(shape: Shape, layer: int) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{layer}.{name}": size for name, size in _parts(shape)}


def _parts(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    wide, narrow = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm"):
        yield f"{name}.weight", (wide,)
    yield "self_attn.k_norm.weight", (narrow,)
    for name, rows in {"q": wide, "k": narrow, "v": narrow, "o": wide}.items():
        yield f"self_attn.{name}_proj.weight", (rows, wide)
    yield "mlp.gate.weight", (shape.experts, wide)
    for expert in range(shape.experts):
        for name in ("gate", "up"):
            yield f"mlp.experts.{expert}.{name}_proj.weight", (shape.inner, wide)
        yield f"mlp.experts.{expert}.down_proj.weight", (wide, shape.inner)


def _random(name: str, size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Weights that keep the residual stream's scale, with routers that are decided."""
    values = torch.empty(size, dtype=dtype).normal_(generator=generator)
    if name.endswith("norm.weight"):
        return values.mul_(0.2).add_(1)
    if "embed_tokens" in name:
        return values
    gain = 2.0 if name.endswith(("gate.weight", "q_proj.weight", "k_proj.weight")) else 1.3
    return values.mul_(gain / size[-1] ** 0.5)
