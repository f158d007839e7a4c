"""What single tokens of a vocabulary are, as bytes."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"  # how SentencePiece writes a space


def byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and on, in order.

    Introduced with GPT-2's tokenizer (Radford et al. 2019, section 2.2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class Vocabulary:
    """Bytes of every token id.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.

    Attributes
    ----------
    byte_level : bool
        Every token is a fixed string of bytes, and a text is their concatenation.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._alphabet = byte_of_character()
        self._bytes: dict[int, bytes] = {}
        self.byte_level = self._decoder_types == {"ByteLevel"}

    @cached_property
    def _decoder_types(self) -> set[str]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
        parts = decoder.get("decoders", [decoder]) if decoder else []
        return {part["type"] for part in parts}

    def bytes_of(self, token_id: int) -> bytes:
        """Bytes of a token as it would be shown on its own; special tokens by name, unknown ids empty."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    def text_bytes_of(self, token_id: int) -> bytes:
        """Bytes that a token adds to a text: those of `bytes_of`, except that special tokens add nothing."""
        return b"" if token_id in self._special else self.bytes_of(token_id)

    def _spell(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if self.byte_level:
            # A token with characters outside the alphabet is an added one, written as it is.
            outside = any(c not in self._alphabet for c in token)
            return str(token).encode() if outside else bytes(self._alphabet[c] for c in token)
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        if SPACE in token or token_id in self._special:
            return str(token).replace(SPACE, " ").encode()
        return str(self._tokenizer.decode([token_id])).encode()
