"""All sequences of one request, run side by side, and what became ready of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from ...workers.protocol import EngineOutput, EngineRequest
from .api_errors import ApiError, server_error
from .choice import Choice
from .job import Job
from .text import StopMatcher
from .tokenizer import Tokenizer


class Streams(Protocol):
    """What is needed of a router."""

    def stream(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Outputs of a sequence up to its end; closing it aborts the sequence."""


class Watcher(Protocol):
    """Counts what happens to sequences, for metrics and the log."""

    def submitted(self) -> None:
        """A sequence waits for its first token."""

    def progressed(self, tokens: int, gap_s: float | None) -> None:
        """Tokens of a sequence came, ``gap_s`` after those before them; None for its first ones."""

    def ended(self, had_tokens: bool) -> None:
        """A sequence ended, or was given up."""


class Generation:
    """Runs a job.

    A prompt's further choices are submitted when its first one has a token: the prompt is in the prefix cache by
    then, and is computed once.

    Parameters
    ----------
    request_id : str
        Begins the ids of its sequences.
    job : Job
    streams : Streams
    tokenizer : Tokenizer
    watcher : Watcher
    """

    def __init__(self, request_id: str, job: Job, streams: Streams, tokenizer: Tokenizer, watcher: Watcher) -> None:
        self._id = request_id
        self._job = job
        self._streams = streams
        self._stop_ids = tokenizer.stop_ids if not job.sampling.ignore_eos else frozenset()
        self._stop_ids |= set(job.sampling.stop_token_ids)
        self._watcher = watcher
        self._dirty: dict[int, Choice] = {}
        self._wake = asyncio.Event()
        self.choices = [self._choice(i, tokenizer) for i in range(len(job.prompts) * job.n)]

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from a cache, once per prompt."""
        return sum(choice.cached_tokens for choice in self.choices[:: self._job.n])

    async def updates(self) -> AsyncGenerator[list[Choice], None]:
        """Choices with something new to `Choice.take`, each time the reader comes back.

        What arrives while the reader is busy comes together next time. Closing the generator, or cancelling its
        reader, aborts every sequence at once.

        Raises
        ------
        ApiError, NoWorker, StreamLost, RequestRefused
            Some sequence failed; the others are aborted.
        """
        run = asyncio.create_task(self._run())
        run.add_done_callback(lambda _: self._wake.set())
        try:
            while not run.done() or self._dirty:
                if not self._dirty:
                    await self._wake.wait()
                self._wake.clear()
                if run.done():
                    run.result()
                changed, self._dirty = list(self._dirty.values()), {}
                if changed:
                    yield changed
            run.result()
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for prompt in range(len(self._job.prompts)):
                    tasks.create_task(self._prompt(prompt))
        except BaseExceptionGroup as group:
            raise _first(group) from None

    async def _prompt(self, prompt: int) -> None:
        first = prompt * self._job.n
        started = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sequence(first, started.set))
            await started.wait()
            for index in range(first + 1, first + self._job.n):
                tasks.create_task(self._sequence(index, _nothing))

    async def _sequence(self, index: int, on_start: Callable[[], None]) -> None:
        choice = self.choices[index]
        came_s: float | None = None
        self._watcher.submitted()
        try:
            async with aclosing(self._streams.stream(self._request(index))) as outputs:
                async for output in outputs:
                    if output.finish_reason == "error":
                        raise _engine_error(output)
                    if output.token_ids:
                        came_s = self._progressed(output, came_s)
                        on_start()
                    complete = choice.push(output)
                    self._dirty[index] = choice
                    self._wake.set()
                    if complete:
                        break
            on_start()  # it may have ended without any token
        finally:
            self._watcher.ended(came_s is not None)

    def _progressed(self, output: EngineOutput, before_s: float | None) -> float:
        now_s = asyncio.get_running_loop().time()
        self._watcher.progressed(len(output.token_ids), None if before_s is None else now_s - before_s)
        return now_s

    def _request(self, index: int) -> EngineRequest:
        prompt, choice = divmod(index, self._job.n)
        sampling = self._job.sampling_of(choice)
        # A further choice is part of what has begun: no queue that filled up meanwhile refuses it.
        return EngineRequest(f"{self._id}-{index}", self._job.prompts[prompt], sampling, admitted=choice > 0)

    def _choice(self, index: int, tokenizer: Tokenizer) -> Choice:
        prompt = index // self._job.n
        return Choice(
            index,
            tokenizer.detokenizer(self._job.prompts[prompt]),
            StopMatcher(self._job.stops),
            self._stop_ids,
            self._job.sampling.min_tokens,
            self._job.echo[prompt] if self._job.echo else "",
        )


def _nothing() -> None:
    """Only a prompt's first sequence has others waiting for it."""


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _engine_error(output: EngineOutput) -> ApiError:
    return server_error(500, f"The engine failed: {output.error or 'no reason given'}", "engine_error")
