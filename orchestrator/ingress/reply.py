"""One admitted request under way: its generation, and the response made from it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from starlette.responses import JSONResponse, Response

from .account import Account
from .answer import Endpoint, EventWriter, Head, error_event, usage_of, whole
from .choice import Choice
from .event_stream import EventStream
from .failures import CLIENT_GONE, FAILURES, api_error
from .generation import Generation, Streams
from .job import Job
from .tokenizer import Tokenizer


class Reply:
    """Runs a job and writes its answer.

    Parameters
    ----------
    endpoint : Endpoint
        Shapes the answer.
    job : Job
    generation : Generation
        Not begun yet.
    account : Account
        Closed when the answer ends.
    head : Head
    tokenizer : Tokenizer
    """

    def __init__(
        self, endpoint: Endpoint, job: Job, generation: Generation, account: Account, head: Head, tokenizer: Tokenizer
    ) -> None:
        self._endpoint = endpoint
        self._job = job
        self._account = account
        self._head = head
        self._vocabulary = tokenizer.vocabulary
        self._generation = generation
        self._updates = generation.updates()

    async def begin(self) -> Response:
        """The whole answer; or, once something is there to be streamed, a response that streams.

        Raises
        ------
        Exception
            One of `FAILURES`: nothing has been sent, so that it can become an answer of its own.
        """
        try:
            if self._job.stream:
                return EventStream(self._events(await anext(self._updates)), self._abandon)
            async for _ in self._updates:
                continue
        except BaseException:
            await self._updates.aclose()
            raise
        self._close(200)
        return JSONResponse(whole(self._endpoint, self._head, self._job, self._generation, self._vocabulary))

    async def _events(self, first: list[Choice]) -> AsyncGenerator[bytes, None]:
        writer = EventWriter(self._endpoint, self._head, self._job, self._vocabulary)
        try:
            yield writer.events(first)
            async for changed in self._updates:
                yield writer.events(changed)
        except FAILURES as e:
            error = api_error(e)
            self._close(error.status, error.code or error.kind)
            yield error_event(error)
            return
        self._close(200)
        yield writer.last(usage_of(self._job, self._generation) if self._job.include_usage else None)

    async def _abandon(self) -> None:
        await self._updates.aclose()
        self._close(CLIENT_GONE, "gone")  # unless it was closed before

    def _close(self, status: int, finish: str = "") -> None:
        reasons = finish or ",".join(choice.finish or "none" for choice in self._generation.choices)
        self._account.close(status, reasons, self._job, self._generation)


def begin_reply(endpoint: Endpoint, job: Job, streams: Streams, account: Account, tokenizer: Tokenizer) -> Reply:
    """A reply whose sequences begin with `Reply.begin`."""
    head = Head(account.request_id, int(time.time()), job.model)
    generation = Generation(account.request_id, job, streams, tokenizer, account)
    return Reply(endpoint, job, generation, account, head, tokenizer)
