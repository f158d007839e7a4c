"""What a request must look like before it is queued."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..protocol import EngineRequest, SamplingParams
from .errors import InvalidRequest


def check_request(request: EngineRequest, vocab_size: int) -> None:
    """Refuse a malformed request.

    Raises
    ------
    InvalidRequest
        Names the field, its value and what was expected.
    """
    if not isinstance(request.id, str) or not request.id:
        raise InvalidRequest(f"id: {request.id!r}; expected a non-empty string")
    if not request.prompt:
        raise InvalidRequest("prompt: empty; expected at least one token id")
    _check_ids("prompt", request.prompt, vocab_size)
    _check_ids("stop_token_ids", request.sampling.stop_token_ids, vocab_size)
    for field, value, ok, expected in _rules(request.sampling, vocab_size):
        if not ok:
            raise InvalidRequest(f"{field}: {value!r}; expected {expected}")


def _check_ids(field: str, ids: tuple[int, ...], vocab_size: int) -> None:
    if not all(map(_is_int, ids)):
        bad = next(token for token in ids if not _is_int(token))
        raise InvalidRequest(f"{field}: {bad!r} is no token id; expected integers")
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        bad = next(token for token in ids if not 0 <= token < vocab_size)
        raise InvalidRequest(f"{field}: token id {bad} is outside the vocabulary; expected 0 to {vocab_size - 1}")


def _rules(s: SamplingParams, vocab_size: int) -> Iterator[tuple[str, object, bool, str]]:
    yield "max_tokens", s.max_tokens, _is_int(s.max_tokens) and s.max_tokens >= 1, "an integer of at least 1"
    yield "temperature", s.temperature, _is_number(s.temperature) and s.temperature >= 0, "a number of at least 0"
    yield "top_p", s.top_p, _is_number(s.top_p) and 0 < s.top_p <= 1, "a number above 0, at most 1"
    yield "top_k", s.top_k, _is_int(s.top_k) and s.top_k >= 0, "an integer of at least 0 (0: all)"
    yield "min_p", s.min_p, _is_number(s.min_p) and 0 <= s.min_p <= 1, "a number from 0 to 1"
    yield "seed", s.seed, s.seed is None or _is_int(s.seed), "an integer or nothing"
    low = f"an integer from 0 to max_tokens ({s.max_tokens})"
    yield "min_tokens", s.min_tokens, _is_int(s.min_tokens) and 0 <= s.min_tokens <= s.max_tokens, low
    yield "ignore_eos", s.ignore_eos, isinstance(s.ignore_eos, bool), "true or false"
    fine = s.logprobs is None or (_is_int(s.logprobs) and 0 <= s.logprobs <= vocab_size)
    yield "logprobs", s.logprobs, fine, f"an integer from 0 to {vocab_size}, or nothing"


def _is_int(value: object) -> bool:
    return type(value) is int


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
