"""What travels between the ingress and a worker's engine: token ids in, token ids out.

Frames are msgpack maps behind a 4-byte little-endian length; see `workers.frontend`. Text, stop strings and
chat templates live in the ingress; the engine sees token ids only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort", "error", "moved"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens of one sequence are chosen and when it ends.

    Parameters
    ----------
    max_tokens : int
        Most tokens to generate, at least 1.
    temperature : float
        0 means greedy.
    top_p, min_p : float
        Nucleus mass in (0, 1]; least probability relative to the most likely token, in [0, 1].
    top_k : int
        Keep the k most likely tokens; 0 keeps all.
    seed : int or None
        Same seed, prompt and parameters give the same tokens.
    stop_token_ids : tuple of int
        Further ids that end the sequence (reported as ``stop``; the id is not part of the text).
    min_tokens : int
        End-of-sequence and stop ids are not sampled before this many tokens.
    ignore_eos : bool
        Go on after an end-of-sequence id.
    logprobs : int or None
        None: none. k >= 0: the chosen token's log-probability and those of the k most likely.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A sequence to be continued. ``prompt`` holds token ids; ``id`` is unique within a connection.

    ``resumed``: another worker had it, or sent it on as it left, so that it is not refused for lack of room in the
    queue, and comes before those that have never been computed. ``admitted``: it belongs to what has begun, so that it
    is not refused for lack of room either, but waits its turn.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    resumed: bool = False
    admitted: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log) of the chosen token and of the most likely ones, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """New tokens of one sequence after one step.

    ``finish_reason`` is None until the last output; where it is ``stop``, the last token is the one that ended the
    sequence. ``cached_tokens`` is how much of the prompt came from the prefix cache. ``error`` says why, where
    ``finish_reason`` is ``error``. Where it is ``moved``, the worker leaves, or will never have room for it, and the
    sequence is to be submitted again with its tokens so far, best to the device ``moved_to`` (empty: to any).
    """

    id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    error: str | None = None
    moved_to: str = ""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is: sequences waiting and running, KV blocks in use and in all."""

    waiting: int = 0
    running: int = 0
    kv_blocks_used: int = 0
    kv_blocks: int = 0


def request_to_wire(request: EngineRequest) -> dict[str, Any]:
    sampling = asdict(request.sampling)
    flags = {"resumed": request.resumed, "admitted": request.admitted}
    return {"id": request.id, "prompt": request.prompt, "sampling": sampling, **flags}


def request_from_wire(data: dict[str, Any]) -> EngineRequest:
    sampling = dict(data["sampling"])
    sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    flags = bool(data["resumed"]), bool(data["admitted"])
    return EngineRequest(data["id"], tuple(data["prompt"]), SamplingParams(**sampling), *flags)


def output_to_wire(output: EngineOutput) -> dict[str, Any]:
    # Once per sequence and step: ten times faster than `asdict`.
    return {
        "id": output.id,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "logprobs": [{"logprob": p.logprob, "top": p.top} for p in output.logprobs],
        "cached_tokens": output.cached_tokens,
        "error": output.error,
        "moved_to": output.moved_to,
    }


def output_from_wire(data: dict[str, Any]) -> EngineOutput:
    logprobs = tuple(TokenLogprob(p["logprob"], tuple((i, v) for i, v in p["top"])) for p in data["logprobs"])
    return EngineOutput(
        data["id"],
        tuple(data["token_ids"]),
        data["finish_reason"],
        logprobs,
        data["cached_tokens"],
        data["error"],
        data["moved_to"],
    )
