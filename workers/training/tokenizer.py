"""A byte-level tokenizer in Hugging Face's files: every byte is one token, nothing is merged, nothing is lost."""

from __future__ import annotations

from typing import Any

from .tokens import EOS, PAD, SPECIALS

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""The model continues text and knows no roles: a conversation is its messages, a line end behind each."""


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary.

    Bytes that are visible in Latin-1 stand for themselves, the others for U+0100 onwards in order (the mapping of
    GPT-2's tokenizer, Radford et al. 2019, which the ``ByteLevel`` pre-tokenizer fixes).
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in visible else next(others)) for b in range(256)]


def tokenizer_json() -> dict[str, Any]:
    """Content of ``tokenizer.json``; a byte's id is its value."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [_special(token, name) for name, token in SPECIALS.items()],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {c: b for b, c in enumerate(byte_characters())} | SPECIALS,
            "merges": [],
        },
    }


def _special(token: int, name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": name, **flags}


def tokenizer_config(max_positions: int) -> dict[str, Any]:
    """Content of ``tokenizer_config.json``."""
    names = {token: name for name, token in SPECIALS.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": names[EOS],
        "pad_token": names[PAD],
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
