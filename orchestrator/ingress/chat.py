"""``/v1/chat/completions``: what is asked and how it is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .api_errors import invalid, unsupported
from .choice import Entry, Piece
from .fields import Fields
from .job import MAX_LOGPROBS, Job, fit_context, read_n, read_sampling, read_stops, read_stream
from .tokenizer import Tokenizer
from .vocabulary import Vocabulary

# As in `job.NEUTRAL`: fields that would change the answer, with the values that would not.
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "chat_template": (),
    "documents": ([],),
    "continue_final_message": (False,),
    "best_of": (1,),
    "echo": (False,),
}


class Chat:
    """The chat endpoint's side of a request."""

    path = "/v1/chat/completions"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    async def read(self, body: Fields, tokenizer: Tokenizer, max_model_len: int, max_prompts: int) -> Job:
        """Check a body and turn its messages, which are one prompt, into token ids.

        Raises
        ------
        ApiError
            400: names the field at fault.
        """
        body.refuse(NEUTRAL)
        stream, include_usage = read_stream(body)
        logprobs = self._wanted_logprobs(body)
        stops = read_stops(body)
        wish = self._max_tokens(body)
        options = {"add_generation_prompt": body.boolean("add_generation_prompt", True)}
        variables = body.child("chat_template_kwargs")
        variables.refuse(NEUTRAL)  # transformers takes them, the template among them, for arguments of its own
        prompt = await tokenizer.encode_chat(_messages(body), {**variables.data, **options})
        if not prompt:
            raise invalid("messages: give no token", "messages", "empty_prompt")
        most = fit_context((prompt,), wish, max_model_len, "messages")
        return Job(
            model=body.text("model"),
            prompts=(prompt,),
            echo=(),
            n=read_n(body),
            sampling=read_sampling(body, tokenizer.vocab_size, most, logprobs),
            stops=stops,
            stream=stream,
            include_usage=include_usage,
        )

    def choice(self, index: int, piece: Piece, vocabulary: Vocabulary, wants_logprobs: bool) -> dict[str, Any]:
        """A whole choice of an answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self.logprobs(piece.entries, vocabulary) if wants_logprobs else None,
            "finish_reason": piece.finish,
        }

    def opening(self) -> Mapping[str, Any] | None:
        """What a streamed choice begins with."""
        return {"role": "assistant", "content": ""}

    def logprobs(self, entries: Sequence[Entry], vocabulary: Vocabulary) -> dict[str, Any]:
        """One object per token."""
        content = []
        for e in entries:
            top = [_token(vocabulary, i, p) for i, p in e.logprob.top]
            content.append({**_token(vocabulary, e.token_id, e.logprob.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    @staticmethod
    def _wanted_logprobs(body: Fields) -> int | None:
        top = body.integer("top_logprobs", None, 0, MAX_LOGPROBS)
        if body.boolean("logprobs"):
            return top or 0
        if top:
            raise invalid("top_logprobs: only allowed when logprobs is true", "top_logprobs", "invalid_value")
        return None

    @staticmethod
    def _max_tokens(body: Fields) -> int | None:
        old = body.integer("max_tokens", None, 1, 2**31 - 1)
        new = body.integer("max_completion_tokens", None, 1, 2**31 - 1)
        if old is not None and new is not None and old != new:
            raise invalid("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        return old if new is None else new


def _messages(body: Fields) -> list[dict[str, Any]]:
    value = body.get("messages")
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise body.wrong("messages", "a non-empty list of objects")
    return [_message(Fields(m, f"messages[{i}]")) for i, m in enumerate(value)]


def _message(message: Fields) -> dict[str, Any]:
    message.refuse({"tool_calls": ([],), "function_call": (), "audio": ()})
    rest = {k: v for k, v in message.data.items() if k in ("name", "reasoning_content")}
    return {"role": message.text("role"), "content": _content(message), **rest}


def _content(message: Fields) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise message.wrong("content", "a string or a non-empty list of text parts")
    return "\n".join(_part(message, i, part) for i, part in enumerate(content))


def _part(message: Fields, index: int, part: Any) -> str:
    where = f"{message.path}.content[{index}]"
    if not isinstance(part, dict):
        raise invalid(f"{where}: expected an object such as {{'type': 'text', 'text': '…'}}", where, "invalid_value")
    fields = Fields(part, where)
    if fields.text("type") != "text":
        raise unsupported(f"{where}.type", f"{part['type']!r}: only 'text' is understood")
    if not isinstance(part.get("text"), str):
        raise fields.wrong("text", "a string")
    return str(part["text"])


def _token(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, Any]:
    raw = vocabulary.bytes_of(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}
