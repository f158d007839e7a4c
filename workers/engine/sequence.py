"""One sequence and the states it goes through."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import InternalError
from ..protocol import EngineRequest, FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Waiting:
    """Holds no KV. ``preempted``: it ran before and starts again from its tokens."""

    preempted: bool = False


@dataclass(slots=True)
class Running:
    """Has KV blocks; the KV of its first ``computed`` tokens is written."""

    computed: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Ended, and holds nothing. ``error`` says why where the reason is ``error``."""

    reason: FinishReason
    error: str | None = None


State = Waiting | Running | Finished

_NEXT: dict[type[State], tuple[type[State], ...]] = {
    Waiting: (Running, Finished),
    Running: (Waiting, Finished),
    Finished: (),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and its tokens so far.

    Parameters
    ----------
    id : str
        Unique within the engine.
    tokens : list of int
        Prompt and generated tokens, of which the first ``prompt_len`` are the prompt.
    sampling : SamplingParams
    seed : int
        Key of its random numbers.
    stop_ids : frozenset of int
        Ids that end it, end-of-sequence included unless ignored.
    arrival : int
        Position in the order of submission.
    resumed, admitted : bool
        See `EngineRequest`.
    cached_tokens : int
        Prompt tokens found in the prefix cache when it was first admitted; -1 before that.
    """

    id: str
    tokens: list[int]
    prompt_len: int
    sampling: SamplingParams
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    arrival: int = 0
    cached_tokens: int = -1
    resumed: bool = False
    admitted: bool = False
    state: State = field(default_factory=Waiting)

    @classmethod
    def from_request(cls, request: EngineRequest, seed: int, eos_ids: tuple[int, ...]) -> Sequence:
        sampling = request.sampling
        stop_ids = frozenset(sampling.stop_token_ids + (() if sampling.ignore_eos else eos_ids))
        prompt = list(request.prompt)
        resumed, admitted = request.resumed, request.admitted
        return cls(request.id, prompt, len(prompt), sampling, seed, stop_ids, resumed=resumed, admitted=admitted)

    @property
    def begun(self) -> bool:
        """It has been computed here, or may have been elsewhere: it comes before those that have not."""
        return self.resumed or not (isinstance(self.state, Waiting) and not self.state.preempted)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def kv_tokens_at_most(self) -> int:
        """Most tokens whose KV it will ever need; the last generated token is never fed back."""
        return self.prompt_len + self.sampling.max_tokens - 1

    @property
    def computed(self) -> int:
        """Tokens whose KV is written."""
        return self.state.computed if isinstance(self.state, Running) else 0

    def to(self, state: State) -> None:
        """Change state.

        Raises
        ------
        InternalError
            The transition is not in the table; nothing has changed then.
        """
        if type(state) not in _NEXT[type(self.state)]:
            raise InternalError(f"sequence {self.id!r}: {self.state} cannot become {state}")
        self.state = state
