"""Write a Qwen3-MoE checkpoint as GGUF, weights in bfloat16: ``PYTHON to_gguf.py CHECKPOINT OUT.gguf``.

Runs with the Python that has gguf, safetensors and torch. Tensor and key names are those of llama.cpp's qwen3moe.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def write_keys(writer: Any, c: dict[str, Any]) -> None:
    rope = c.get("rope_parameters", c)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_expert_count(c.get("num_experts") or c["num_local_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_vocab_size(c["vocab_size"])


def write_tokenizer(writer: Any, folder: Path, size: int) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    names = {i: t for t, i in data["model"]["vocab"].items()}
    special = {t["id"] for t in data["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([3 if i in special else 1 for i in range(size)])  # control, normal
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in data["model"]["merges"]])


def write_tensors(writer: Any, tensors: dict[str, Any], c: dict[str, Any]) -> None:
    import gguf  # type: ignore[import-not-found]
    import numpy
    import torch

    def add(name: str, tensor: Any, wide: bool = False) -> None:
        if wide or tensor.dim() == 1:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            raw = tensor.contiguous().view(torch.int16).numpy().view(numpy.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

    add("token_embd.weight", tensors["model.embed_tokens.weight"])
    add("output_norm.weight", tensors["model.norm.weight"])
    add("output.weight", tensors["lm_head.weight"])
    for layer in range(c["num_hidden_layers"]):
        theirs, ours = f"blk.{layer}.", f"model.layers.{layer}."
        for name, short in LAYER.items():
            add(f"{theirs}{short}.weight", tensors[f"{ours}{name}.weight"])
        add(f"{theirs}ffn_gate_inp.weight", tensors[f"{ours}mlp.gate.weight"], wide=True)
        for name, short in EXPERTS.items():
            experts = range(c.get("num_experts") or c["num_local_experts"])
            stacked = torch.stack([tensors[f"{ours}mlp.experts.{e}.{name}.weight"] for e in experts])
            add(f"{theirs}{short}.weight", stacked)


def main() -> None:
    import gguf
    from safetensors.torch import load_file

    folder = Path(sys.argv[1])
    config = json.loads((folder / "config.json").read_text())
    writer: Any = gguf.GGUFWriter(sys.argv[2], "qwen3moe")
    write_keys(writer, config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    write_tokenizer(writer, folder, config["vocab_size"])
    write_tensors(writer, load_file(folder / "model.safetensors"), config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
