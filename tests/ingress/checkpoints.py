"""Tiny tokenizers of the two common makes, written as checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXT = ["the quick brown fox jumps over the lazy dog", "import sys\nprint('hello, world')", "größer 中文 🎉 naïve"]


def byte_level(path: Path, template: str | None = TEMPLATE) -> Path:
    """Byte-level BPE (as OLMoE, Qwen and DeepSeek have it)."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    inner.train_from_iterator(
        TEXT * 3, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    inner.add_tokens(["<think>", " two words"])
    return _save(inner, path, template)


def sentence_piece(path: Path) -> Path:
    """BPE with byte fall-back and a space before each word (as Mixtral has it)."""
    pieces = ["<s>", "</s>", "<pad>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "e", "h", "t", "th", "▁th", "▁the"]
    pieces += [*"abcdfgijk.", "中"]
    inner = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("t", "h"), ("▁", "th"), ("▁th", "e")],
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _save(inner, path, None)


def _save(inner: Tokenizer, path: Path, template: str | None) -> Path:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer) + 5, "eos_token_id": 1}))
    return path
