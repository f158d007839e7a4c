"""A sequence that may change workers: what has come so far, and what is to be asked for next."""

from __future__ import annotations

from dataclasses import replace

from ...workers.protocol import EngineOutput, EngineRequest
from .members import StreamLost, WorkerLost

MAX_KILLS = 8  # workers lost in turn while they computed its prompt: the request itself may be what kills them
MAX_LOSSES = 32  # workers lost in turn at all without a token; who computed what is a guess, so that this ends it


class Continuation:
    """The state of one request across the workers that serve it in turn.

    Parameters
    ----------
    request : EngineRequest
        As it was first asked.
    """

    def __init__(self, request: EngineRequest) -> None:
        self._request = request
        self._produced: list[int] = []
        self._cached: int | None = None
        self._attempts = 0
        self._kills = 0
        self._losses = 0
        self.interrupted_at_s: float | None = None
        self.finished = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and everything generated so far."""
        return (*self._request.prompt, *self._produced)

    def next_request(self) -> EngineRequest:
        """What to submit now: the request itself, or its continuation behind the tokens that came already.

        Seeded sampling draws by (seed, position in the whole sequence), so the same tokens follow.
        """
        done = len(self._produced)
        self._attempts += 1
        if self._attempts == 1:
            return self._request
        sampling = replace(
            self._request.sampling,
            max_tokens=self._request.sampling.max_tokens - done,
            min_tokens=max(0, self._request.sampling.min_tokens - done),
        )
        name = f"{self._request.id}.{self._attempts}"
        resumed = bool(done) or self.interrupted_at_s is not None  # not where it has only met full queues
        return replace(self._request, id=name, prompt=self.tokens, sampling=sampling, resumed=resumed)

    def note(self, output: EngineOutput) -> EngineOutput | None:
        """Take in an output; returns it as the first worker would have sent it, or None where it carries nothing."""
        self._produced.extend(output.token_ids)
        if output.token_ids:
            self.interrupted_at_s = None
            self._kills = self._losses = 0
        if output.finish_reason == "moved":
            self.interrupted_at_s = None  # while it had a worker, nobody was missing
        # Given up or handed over by its worker: for whoever reads, it goes on.
        finish = None if output.finish_reason in ("abort", "moved") else output.finish_reason
        if self._cached is None and (output.token_ids or finish):
            self._cached = min(output.cached_tokens, len(self._request.prompt))
        self.finished = finish is not None
        if not output.token_ids and finish is None:
            return None
        return replace(output, id=self._request.id, finish_reason=finish, moved_to="", cached_tokens=self._cached or 0)

    def lost(self, loss: WorkerLost, now_s: float) -> EngineOutput | None:
        """As `interrupted`, because the worker is gone.

        Raises
        ------
        StreamLost
            Too many workers in turn were lost without any progress.
        """
        self._losses += 1
        self._kills += loss.computing
        if self._kills >= MAX_KILLS or self._losses >= MAX_LOSSES:
            raise StreamLost(f"{self._losses} workers in turn were lost without progress, the last one: {loss}")
        self.interrupted_at_s = None  # while it had a worker, nobody was missing
        return self.interrupted(now_s)

    def interrupted(self, now_s: float) -> EngineOutput | None:
        """It has to go on elsewhere. Returns the last output where all tokens had come but their end had not."""
        if len(self._produced) >= self._request.sampling.max_tokens:
            self.finished = True
            return EngineOutput(self._request.id, (), "length", (), self._cached or 0)
        if self.interrupted_at_s is None:
            self.interrupted_at_s = now_s
        return None
