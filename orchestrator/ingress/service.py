"""One request from its body to the beginning of its answer, on either endpoint."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ...workers.engine.errors import QueueFull
from .account import Account, Queue
from .answer import Endpoint
from .api_errors import ApiError, invalid
from .event_stream import unless_gone
from .failures import CLIENT_GONE, FAILURES, api_error
from .intake import read_json
from .job import Job
from .metrics import Metrics
from .reply import begin_reply
from .router import Router
from .settings import IngressSettings
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Service:
    """What every request needs.

    Parameters
    ----------
    settings : IngressSettings
    tokenizer : Tokenizer
    router : Router
    metrics : Metrics
    queue : Queue
    """

    settings: IngressSettings
    tokenizer: Tokenizer
    router: Router
    metrics: Metrics
    queue: Queue

    async def answer(self, endpoint: Endpoint, request: Request) -> Response:
        """Read, admit and run a request. Errors before the first token are answers of their own."""
        request_id = endpoint.id_prefix + uuid.uuid4().hex
        account = Account(request_id, endpoint.path, self.metrics, self.queue, time.monotonic)
        try:
            job = await self._admit(endpoint, request)
            account.accepted(job)
            reply = begin_reply(endpoint, job, self.router, account, self.tokenizer)
            return await unless_gone(request.receive, reply.begin())
        except (ClientDisconnect, asyncio.CancelledError) as e:
            account.close(CLIENT_GONE, "gone")
            if isinstance(e, asyncio.CancelledError):
                raise
            return Response(status_code=CLIENT_GONE)
        except FAILURES as e:
            error = api_error(e, self.settings.retry_after_s)
            account.close(error.status, error.code or error.kind)
            return JSONResponse(error.body, error.status, error.headers)

    def check_model(self, name: str) -> None:
        """Refuse a model that is not served here.

        Raises
        ------
        ApiError
            404 ``model_not_found``.
        """
        if name not in self.settings.model_names:
            raise ApiError(404, f"The model {name!r} does not exist", param="model", code="model_not_found")

    async def _admit(self, endpoint: Endpoint, request: Request) -> Job:
        body = await read_json(request, self.settings.max_body_bytes)
        self.check_model(body.text("model"))
        most = self.settings.max_waiting * self.router.workers
        job = await endpoint.read(body, self.tokenizer, self.settings.max_model_len, most)
        waiting, sequences = self.queue.waiting, len(job.prompts) * job.n
        if sequences > most:
            raise invalid(f"n: {sequences} sequences of all prompts: expected at most {most}", "n", "invalid_value")
        if waiting + sequences > most:
            raise QueueFull(f"{waiting} sequences are waiting already, of at most {most}")
        return job
