"""``/v1/completions``: what is asked and how it is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .api_errors import invalid, unsupported
from .choice import Entry, Piece
from .fields import Fields, are_ids
from .job import MAX_LOGPROBS, Job, fit_context, read_n, read_sampling, read_stops, read_stream
from .tokenizer import Tokenizer
from .vocabulary import Vocabulary

DEFAULT_MAX_TOKENS = 16  # the OpenAI API's
PROMPT = "a non-empty string, list of strings, list of token ids, or list of lists of token ids"


class Completions:
    """The completions endpoint's side of a request."""

    path = "/v1/completions"
    kind = "text_completion"
    chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    async def read(self, body: Fields, tokenizer: Tokenizer, max_model_len: int, max_prompts: int) -> Job:
        """Check a body and turn its prompts into token ids.

        Raises
        ------
        ApiError
            400: names the field at fault.
        """
        n = read_n(body)
        body.refuse({"suffix": ("",), "best_of": (n,)})
        stream, include_usage = read_stream(body)
        logprobs = body.integer("logprobs", None, 0, MAX_LOGPROBS)
        echo = body.boolean("echo")
        if echo and logprobs is not None:
            raise unsupported("echo", "log-probabilities of a prompt are not computed; leave out echo or logprobs")
        wish = body.integer("max_tokens", None, 1, 2**31 - 1)
        stops = read_stops(body)
        prompts = await self._prompts(body, tokenizer, max_prompts)
        fits = fit_context(prompts, wish, max_model_len, "prompt")
        most = min(fits, DEFAULT_MAX_TOKENS) if wish is None else fits
        return Job(
            model=body.text("model"),
            prompts=prompts,
            echo=_echo(_items(body), prompts, tokenizer) if echo else (),
            n=n,
            sampling=read_sampling(body, tokenizer.vocab_size, most, logprobs),
            stops=stops,
            stream=stream,
            include_usage=include_usage,
        )

    def choice(self, index: int, piece: Piece, vocabulary: Vocabulary, wants_logprobs: bool) -> dict[str, Any]:
        """A whole choice of an answer."""
        logprobs = self.logprobs(piece.entries, vocabulary) if wants_logprobs else None
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def opening(self) -> Mapping[str, Any] | None:
        """What a streamed choice begins with."""
        return None

    def logprobs(self, entries: Sequence[Entry], vocabulary: Vocabulary) -> dict[str, Any]:
        """Parallel lists, one item per token."""
        return {
            "tokens": [_name(vocabulary, e.token_id) for e in entries],
            "token_logprobs": [e.logprob.logprob for e in entries],
            "top_logprobs": [{_name(vocabulary, i): p for i, p in e.logprob.top} for e in entries],
            "text_offset": [e.offset for e in entries],
        }

    @staticmethod
    async def _prompts(body: Fields, tokenizer: Tokenizer, most: int) -> tuple[tuple[int, ...], ...]:
        items = _items(body)
        if not items or not all(isinstance(item, str | list) and item for item in items):
            raise body.wrong("prompt", PROMPT)
        if len(items) > most:
            raise invalid(f"prompt: {len(items)} prompts: expected at most {most}", "prompt", "invalid_value")
        if any(isinstance(item, list) and not are_ids(item, tokenizer.vocab_size) for item in items):
            raise body.wrong("prompt", f"{PROMPT}, ids from 0 to {tokenizer.vocab_size - 1}")
        encoded = iter(await tokenizer.encode([item for item in items if isinstance(item, str)]))
        prompts = tuple(next(encoded) if isinstance(item, str) else tuple(item) for item in items)
        if not all(prompts):
            raise invalid("prompt: gives no token", "prompt", "empty_prompt")
        return prompts


def _items(body: Fields) -> list[Any]:
    """What stands for a prompt each."""
    prompt = body.get("prompt")
    return prompt if isinstance(prompt, list) and not are_ids(prompt, 2**63) else [prompt]


def _echo(items: Sequence[Any], prompts: Sequence[Sequence[int]], tokenizer: Tokenizer) -> tuple[str, ...]:
    pairs = zip(items, prompts, strict=True)
    return tuple(item if isinstance(item, str) else tokenizer.decode(ids) for item, ids in pairs)


def _name(vocabulary: Vocabulary, token_id: int) -> str:
    """A token's text; the bytes of half a character are spelt out, so that names stay distinct."""
    raw = vocabulary.bytes_of(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
