"""Greedy streams through the worker's door, read in a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from concertina.workers.client import WorkerClient
from concertina.workers.protocol import EngineOutput, EngineRequest, SamplingParams

from .site import TOKEN, AnyWorker

T = TypeVar("T")


class Stream:
    """One request: its tokens so far, and its last output in the end."""

    def __init__(self, prompt: Sequence[int], max_tokens: int) -> None:
        self.prompt, self.max_tokens = tuple(prompt), max_tokens
        self.tokens: list[int] = []
        self.cached_tokens = 0
        self._grown = threading.Condition()
        self.end: Future[EngineOutput] = Future()

    @property
    def so_far(self) -> list[int]:
        return [*self.prompt, *self.tokens]

    @property
    def left(self) -> int:
        return self.max_tokens - len(self.tokens)

    def wait_for(self, tokens: int, timeout_s: float = 20.0) -> None:
        """Until there are so many tokens."""
        with self._grown:
            enough = self._grown.wait_for(lambda: len(self.tokens) >= tokens or self.end.done(), timeout_s)
            assert enough, f"{len(self.tokens)} tokens after {timeout_s} s"

    def finished(self) -> str | None:
        """Why it ended, once it has."""
        return self.end.result(20).finish_reason

    async def read(self, client: WorkerClient) -> None:
        sampling = SamplingParams(self.max_tokens, temperature=0, ignore_eos=True)
        try:
            async for output in client.submit(EngineRequest("r", self.prompt, sampling)):
                with self._grown:
                    self.tokens += output.token_ids
                    self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
                    self._grown.notify_all()
                last = output
        except BaseException as e:  # noqa: BLE001 - the test asks for it
            self.end.set_exception(e)
        else:
            self.end.set_result(last)
        with self._grown:
            self._grown.notify_all()


class Clients:
    """Connections to workers, in an event loop of their own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._open: list[WorkerClient] = []
        self._reading: list[Future[None]] = []

    def start(self, worker: AnyWorker, prompt: Sequence[int], max_tokens: int) -> Stream:
        """Submit a request on a connection of its own."""
        stream = Stream(prompt, max_tokens)
        client = self._do(WorkerClient.connect(*worker.call("report").address, TOKEN))
        self._open.append(client)
        self._reading.append(asyncio.run_coroutine_threadsafe(stream.read(client), self._loop))
        return stream

    def again(self, worker: AnyWorker, stream: Stream) -> Stream:
        """What the ingress does when a worker is gone: submit the prompt with the tokens so far."""
        return self.start(worker, stream.so_far, stream.left)

    def close(self) -> None:
        for client in self._open:
            self._do(client.close())
        for reading in self._reading:
            reading.exception(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()

    def _do(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(20)


@contextmanager
def clients() -> Iterator[Clients]:
    opened = Clients()
    try:
        yield opened
    finally:
        opened.close()
