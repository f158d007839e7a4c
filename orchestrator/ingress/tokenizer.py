"""The checkpoint's tokenizer: prompts to ids, chats to prompts, ids back to text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from ...errors import OperatorError
from .api_errors import invalid
from .text import ByteDetokenizer, Detokenizer, WindowDetokenizer
from .vocabulary import Vocabulary

LONG_TEXT = 4096  # characters; tokenising more than this takes milliseconds, during which no stream would move
CONTEXT_TOKENS = 6  # of the prompt, for detokenisers that look back

Messages = Sequence[Mapping[str, Any]]


class Tokenizer:
    """A transformers tokenizer with what the ingress needs of it.

    Parameters
    ----------
    tokenizer
        What ``AutoTokenizer.from_pretrained`` gave.
    stop_ids : frozenset of int
        End-of-sequence ids of the checkpoint.
    vocab_size : int
        Ids are below this.
    """

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int] = frozenset(), vocab_size: int = 0) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.vocab_size = vocab_size or len(tokenizer)
        self.vocabulary = Vocabulary(tokenizer)

    @classmethod
    def load(cls, checkpoint: str) -> Tokenizer:
        """Read the tokenizer, end-of-sequence ids and vocabulary size of a checkpoint directory.

        Raises
        ------
        OperatorError
            No such directory, or no tokenizer in it that transformers can read.
        """
        from transformers import AutoTokenizer  # here, because it costs a second

        if not Path(checkpoint).is_dir():
            raise OperatorError(f"ingress: checkpoint: {checkpoint!r}: expected a directory")
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as e:
            raise OperatorError(f"ingress: checkpoint: {checkpoint}: no readable tokenizer: {e}") from e
        config = _read_json(Path(checkpoint, "config.json"))
        generation = _read_json(Path(checkpoint, "generation_config.json"))
        stop_ids = _ids(tokenizer.eos_token_id) | _ids(config.get("eos_token_id"))
        stop_ids |= _ids(generation.get("eos_token_id"))
        return cls(tokenizer, frozenset(stop_ids), int(config.get("vocab_size") or 0))

    async def encode(self, texts: Sequence[str], special: bool = True) -> list[tuple[int, ...]]:
        """Ids of each text, with the special tokens that begin or end one where ``special``."""

        def encoded() -> list[tuple[int, ...]]:
            return [self._encode(text, special) for text in texts]

        return encoded() if sum(map(len, texts)) < LONG_TEXT else await asyncio.to_thread(encoded)

    async def encode_chat(self, messages: Messages, options: Mapping[str, Any]) -> tuple[int, ...]:
        """Ids of a conversation in the checkpoint's chat template.

        Raises
        ------
        ApiError
            400: the checkpoint has no chat template, or the template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise invalid(
                "This model's checkpoint has no chat template; use /v1/completions", "messages", "no_chat_template"
            )
        try:
            text = await asyncio.to_thread(self._render, messages, options)
        except (TemplateError, TypeError, ValueError, KeyError) as e:
            raise invalid(f"The model's chat template refuses these messages: {e}", "messages") from e
        return (await self.encode([text], special=False))[0]

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """A fresh detokenizer for what follows ``prompt``."""
        if self.vocabulary.byte_level:
            return ByteDetokenizer(self.vocabulary.text_bytes_of)
        return WindowDetokenizer(self.decode, prompt[-CONTEXT_TOKENS:])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens and exactly as the tokens spell it."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=special, verbose=False))

    def _render(self, messages: Messages, options: Mapping[str, Any]) -> str:
        return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
    except ValueError as e:
        raise OperatorError(f"ingress: {path}: not JSON: {e}") from e
    if not isinstance(data, dict):
        raise OperatorError(f"ingress: {path}: expected a JSON object, got {type(data).__name__}")
    return data


def _ids(value: int | list[int] | None) -> set[int]:
    if value is None:
        return set()
    return set(value) if isinstance(value, list) else {value}
