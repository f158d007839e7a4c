"""The checkpoint that serving is measured on: a small Qwen3-MoE with random weights, the same every time.

4 layers, 512 wide, 8 query and 4 key heads of 64, 32 experts of inner width 256 of which 8 serve a token, vocabulary
2048, bfloat16. The tokenizer is trained on the standard library's sources.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

_SOURCES = 60  # files the tokenizer is trained on
_VOCABULARY = 2048
_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def ensure_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into ``folder`` unless one is there."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _tokenizer().save_pretrained(folder)
        _write_model(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train(sorted(map(str, Path(sysconfig.get_path("stdlib")).glob("*.py")))[:_SOURCES], trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    make: Any = PreTrainedTokenizerFast
    tokenizer: Any = make(tokenizer_object=raw, **names)
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _write_model(folder: Path) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "num_experts": 32,
        "num_experts_per_tok": 8,
    }
    config = Qwen3MoeConfig(
        **sizes,
        max_position_embeddings=2048,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model: Any = Qwen3MoeForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
