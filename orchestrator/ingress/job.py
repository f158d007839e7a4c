"""What a request asks for, once it has been read and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...workers.protocol import SamplingParams
from .api_errors import context_exceeded, invalid
from .fields import Fields

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOPS, LONGEST_STOP = 16, 1024
MAX_STOP_IDS = 128

# Fields that would change the answer, each with the values that would not; anything else we do not know is ignored.
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}


@dataclass(frozen=True)
class Job:
    """One request of a client.

    Parameters
    ----------
    model : str
        As the client named it.
    prompts : tuple of tuples of int
        Token ids of each prompt.
    echo : tuple of str
        Text to put before the completions, one per prompt; empty for none.
    n : int
        Choices per prompt.
    sampling : SamplingParams
        For the first choice; see `seed_of`.
    stops : tuple of str
        Stop strings.
    stream, include_usage : bool
        Whether to stream, and whether the stream ends with the usage.
    """

    model: str
    prompts: tuple[tuple[int, ...], ...]
    echo: tuple[str, ...]
    n: int
    sampling: SamplingParams
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    def sampling_of(self, choice: int) -> SamplingParams:
        """Parameters of one of a prompt's choices: the same, but for a seed of its own."""
        if self.sampling.seed is None or choice == 0:
            return self.sampling
        digest = hashlib.blake2b(f"{self.sampling.seed}/{choice}".encode(), digest_size=8).digest()
        return replace(self.sampling, seed=int.from_bytes(digest, "little") >> 1)


def read_stream(body: Fields) -> tuple[bool, bool]:
    """``stream`` and ``stream_options.include_usage``."""
    stream = body.boolean("stream")
    options = body.child("stream_options")
    include_usage = options.boolean("include_usage")
    if body.get("stream_options") is not None and not stream:
        raise invalid("stream_options is only allowed when stream is true", "stream_options", "invalid_value")
    return stream, include_usage


def read_sampling(body: Fields, vocab_size: int, max_tokens: int, logprobs: int | None) -> SamplingParams:
    """The sampling fields that completions and chats share.

    Raises
    ------
    ApiError
        400: a field has a wrong type or value, or asks for what is not supported.
    """
    body.refuse(NEUTRAL)
    stop_ids = body.integers("stop_token_ids", vocab_size)
    if len(stop_ids) > MAX_STOP_IDS:
        raise body.wrong("stop_token_ids", f"at most {MAX_STOP_IDS} ids")
    top_k = body.integer("top_k", 0, -1, 2**31 - 1) or 0
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.number("temperature", 1.0, lambda v: 0 <= v <= 2, "a number from 0 to 2"),
        top_p=body.number("top_p", 1.0, lambda v: 0 < v <= 1, "a number above 0, at most 1"),
        top_k=max(0, top_k),
        min_p=body.number("min_p", 0.0, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
        seed=body.integer("seed", None, -(2**63), 2**63 - 1),
        stop_token_ids=stop_ids,
        min_tokens=body.integer("min_tokens", 0, 0, max_tokens) or 0,
        ignore_eos=body.boolean("ignore_eos"),
        logprobs=logprobs,
    )


def read_stops(body: Fields) -> tuple[str, ...]:
    return body.strings("stop", MAX_STOPS, LONGEST_STOP)


def read_n(body: Fields) -> int:
    return body.integer("n", 1, 1, MAX_N) or 1


def fit_context(prompts: Sequence[Sequence[int]], max_tokens: int | None, limit: int, param: str) -> int:
    """Tokens to generate at most; without a wish, as many as the context leaves behind the longest prompt.

    Raises
    ------
    ApiError
        400 ``context_length_exceeded``: a prompt and its completion do not fit.
    """
    longest = max(len(prompt) for prompt in prompts)
    if longest + (max_tokens or 1) > limit:
        raise context_exceeded(limit, longest, max_tokens or 1, param)
    return max_tokens or limit - longest
