"""One choice of an answer: engine outputs in, text and log-probabilities ready to be written out."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

from ...workers.protocol import EngineOutput, TokenLogprob
from .text import Detokenizer, StopMatcher

FinishReason = Literal["stop", "length"]
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


@dataclass(frozen=True, slots=True)
class Entry:
    """A token's log-probabilities. ``offset``: characters of text in front of it."""

    token_id: int
    offset: int
    logprob: TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """What became ready since the last piece; ``finish`` is set in the last one."""

    text: str
    entries: tuple[Entry, ...] = ()
    finish: FinishReason | None = None


@dataclass(slots=True)
class _Ready:
    text: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


class Choice:
    """Text of one sequence, up to its stop string or token.

    However outputs are grouped, the pieces add up to the same (I3). A token's log-probabilities come out with its text,
    and not at all where its text lies behind a stop string.

    Parameters
    ----------
    index : int
        Position in the answer.
    detokenizer : Detokenizer
        Fresh, for this sequence.
    matcher : StopMatcher
        Fresh, for this sequence.
    stop_ids : collection of int
        Tokens that end the sequence and are no part of the text.
    min_tokens : int
        The text of so many tokens is not searched for stop strings.
    echo : str
        Text in front of what is generated.
    """

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        matcher: StopMatcher,
        stop_ids: Collection[int] = (),
        min_tokens: int = 0,
        echo: str = "",
    ) -> None:
        self.index = index
        self.tokens = 0
        self.cached_tokens = 0
        self.finish: FinishReason | None = None
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._stop_ids = stop_ids
        self._min_tokens = min_tokens
        self._decoded = self._released = len(echo)
        self._entries: deque[Entry] = deque()
        self._ready = _Ready([echo] if echo else [])

    def push(self, output: EngineOutput) -> bool:
        """Take in new tokens; True once the choice is complete and its sequence may be aborted.

        Tokens behind a stop string neither count nor appear.
        """
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        last = len(output.token_ids) - 1
        for i, token_id in enumerate(output.token_ids):
            self.tokens += 1
            if i == last and output.finish_reason == "stop" and token_id in self._stop_ids:
                break
            if output.logprobs:
                self._entries.append(Entry(token_id, self._decoded, _finite(output.logprobs[i])))
            if self._add(self._detokenizer.push(token_id)):
                return True
        if output.finish_reason is not None:
            self._end("stop" if output.finish_reason == "stop" else "length")
        return self.finish is not None

    def take(self) -> Piece:
        """Everything that became ready since the last call."""
        ready, self._ready = self._ready, _Ready()
        return Piece("".join(ready.text), tuple(ready.entries), self.finish)

    def _add(self, text: str) -> bool:
        self._decoded += len(text)
        self._release(text if self.tokens <= self._min_tokens else self._matcher.push(text))
        if self._matcher.matched is None:
            return False
        self.finish = "stop"
        return True

    def _end(self, reason: FinishReason) -> None:
        rest = self._detokenizer.flush()
        if not self._add(rest):
            self._release(self._matcher.flush())
            self._ready.entries.extend(self._entries)
            self.finish = reason

    def _release(self, text: str) -> None:
        if not text:
            return
        self._released += len(text)
        self._ready.text.append(text)
        while self._entries and self._entries[0].offset < self._released:
            self._ready.entries.append(self._entries.popleft())


def _finite(logprob: TokenLogprob) -> TokenLogprob:
    if logprob.logprob >= LEAST_LOGPROB and all(p >= LEAST_LOGPROB for _, p in logprob.top):
        return logprob
    top = tuple((i, max(p, LEAST_LOGPROB)) for i, p in logprob.top)
    return replace(logprob, logprob=max(logprob.logprob, LEAST_LOGPROB), top=top)
