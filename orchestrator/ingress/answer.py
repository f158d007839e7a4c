"""An answer's JSON: one object, or server-sent events made from pieces prepared once per request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .api_errors import ApiError
from .choice import Choice, Entry, Piece
from .fields import Fields
from .generation import Generation
from .job import Job
from .tokenizer import Tokenizer
from .vocabulary import Vocabulary

DONE = b"data: [DONE]\n\n"


class Endpoint(Protocol):
    """How one endpoint reads requests and shapes answers."""

    path: str
    kind: str
    chunk_kind: str
    id_prefix: str

    async def read(self, body: Fields, tokenizer: Tokenizer, max_model_len: int, max_prompts: int) -> Job:
        """The job that a body asks for."""

    def choice(self, index: int, piece: Piece, vocabulary: Vocabulary, wants_logprobs: bool) -> dict[str, Any]:
        """A whole choice of an answer."""

    def opening(self) -> Mapping[str, Any] | None:
        """What a streamed choice begins with; None where choices consist of text alone."""

    def logprobs(self, entries: Sequence[Entry], vocabulary: Vocabulary) -> dict[str, Any]:
        """Log-probabilities of some tokens."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer repeats: id, seconds since the epoch, and model."""

    id: str
    created: int
    model: str


def usage_of(job: Job, generation: Generation) -> dict[str, Any]:
    """Token counts; a prompt counts once, whatever its number of choices."""
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": generation.completion_tokens,
        "total_tokens": job.prompt_tokens + generation.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


def whole(endpoint: Endpoint, head: Head, job: Job, generation: Generation, vocabulary: Vocabulary) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    wants = job.sampling.logprobs is not None
    return {
        "id": head.id,
        "object": endpoint.kind,
        "created": head.created,
        "model": head.model,
        "choices": [endpoint.choice(c.index, c.take(), vocabulary, wants) for c in generation.choices],
        "usage": usage_of(job, generation),
    }


def error_event(error: ApiError) -> bytes:
    """The event that ends a stream which failed half-way."""
    return b"data: " + _json(error.body) + b"\n\n" + DONE


class EventWriter:
    """Server-sent events of one streamed answer.

    Parameters
    ----------
    endpoint : Endpoint
    head : Head
    job : Job
    vocabulary : Vocabulary
    """

    def __init__(self, endpoint: Endpoint, head: Head, job: Job, vocabulary: Vocabulary) -> None:
        self._endpoint = endpoint
        self._vocabulary = vocabulary
        self._wants_logprobs = job.sampling.logprobs is not None
        self._opened: set[int] = set()
        self._ended: set[int] = set()
        fields = {"id": head.id, "object": endpoint.chunk_kind, "created": head.created, "model": head.model}
        self._start = b"data: " + _json(fields)[:-1] + b', "choices": ['
        self._end = b'], "usage": null}\n\n' if job.include_usage else b"]}\n\n"

    def events(self, choices: Sequence[Choice]) -> bytes:
        """One event for each choice that has something new, ready to be written at once."""
        return b"".join(self._choice(choice) for choice in choices)

    def last(self, usage: Mapping[str, Any] | None) -> bytes:
        """The end, behind the usage where that was asked for."""
        if usage is None:
            return DONE
        return self._start + b'], "usage": ' + _json(usage) + b"}\n\n" + DONE

    def _choice(self, choice: Choice) -> bytes:
        piece = choice.take()
        opening = self._endpoint.opening()
        out = b""
        if opening is not None and choice.index not in self._opened:
            self._opened.add(choice.index)
            out = self._event(choice.index, b'"delta": ' + _json(opening), b"null", None)
        finish = None if choice.index in self._ended else piece.finish  # it may have come while the others were written
        if piece.text or piece.entries or finish:
            logprobs = b"null"
            if self._wants_logprobs and piece.entries:
                logprobs = _json(self._endpoint.logprobs(piece.entries, self._vocabulary))
            text = _json(piece.text)
            if opening is None:
                content = b'"text": ' + text
            else:
                content = b'"delta": {"content": ' + text + b"}" if piece.text else b'"delta": {}'
            out += self._event(choice.index, content, logprobs, finish)
        if finish:
            self._ended.add(choice.index)
        return out

    def _event(self, index: int, content: bytes, logprobs: bytes, finish: str | None) -> bytes:
        tail = b', "finish_reason": ' + _json(finish) + b"}"
        return b"".join((self._start, b'{"index": %d, ' % index, content, b', "logprobs": ', logprobs, tail, self._end))


def _json(value: Any) -> bytes:
    # ASCII only: many clients cut lines at U+2028 and its kind too, which JSON allows to stand for themselves.
    return json.dumps(value).encode()
