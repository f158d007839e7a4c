"""What happened to one request: kept while it runs, for the metrics and for its line in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .generation import Generation
from .job import Job
from .metrics import Metrics

logger = logging.getLogger("concertina.ingress")


class Queue:
    """Sequences of this ingress that wait for their first token, and those that have it.

    Parameters
    ----------
    metrics : Metrics
        Whose gauges follow.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.waiting = 0
        self.running = 0

    def add(self, waiting: int, running: int) -> None:
        self.waiting += waiting
        self.running += running
        self._metrics.waiting.set(self.waiting)
        self._metrics.running.set(self.running)


class Account:
    """The books of one request; the `Watcher` of its generation.

    Parameters
    ----------
    request_id, endpoint : str
    metrics : Metrics
    queue : Queue
    now_s : callable
        A steady clock.
    """

    def __init__(
        self, request_id: str, endpoint: str, metrics: Metrics, queue: Queue, now_s: Callable[[], float]
    ) -> None:
        self.request_id = request_id
        self._endpoint = endpoint
        self._metrics = metrics
        self._queue = queue
        self._now_s = now_s
        self._began_s = now_s()
        self._first_s: float | None = None
        self._reserved = 0
        self._closed = False

    def accepted(self, job: Job) -> None:
        """Take the places of all choices in the queue now, so that a burst of requests cannot pass it together."""
        self._metrics.prompt_tokens.inc(job.prompt_tokens)
        self._reserved = len(job.prompts) * job.n
        self._queue.add(self._reserved, 0)

    def submitted(self) -> None:
        if self._reserved:
            self._reserved -= 1
        else:
            self._queue.add(1, 0)

    def progressed(self, tokens: int, gap_s: float | None) -> None:
        self._metrics.generated_tokens.inc(tokens)
        if gap_s is not None:
            self._metrics.between_tokens_s.observe(gap_s)
            return
        self._queue.add(-1, 1)
        if self._first_s is None:
            self._first_s = self._now_s() - self._began_s
            self._metrics.first_token_s.observe(self._first_s)

    def ended(self, had_tokens: bool) -> None:
        self._queue.add(0, -1) if had_tokens else self._queue.add(-1, 0)

    def close(self, status: int, finish: str, job: Job | None = None, generation: Generation | None = None) -> None:
        """Count and log the request; only the first call does."""
        if self._closed:
            return
        self._closed = True
        self._queue.add(-self._reserved, 0)
        self._reserved = 0
        self._metrics.requests.labels(self._endpoint, str(status)).inc()
        prompt, cached, generated = 0, 0, 0
        if job is not None and generation is not None:
            prompt, cached, generated = job.prompt_tokens, generation.cached_tokens, generation.completion_tokens
            self._metrics.cached_tokens.inc(cached)
        first = "-" if self._first_s is None else f"{self._first_s:.3f}s"
        logger.info(
            "%s %s %d prompt=%d cached=%d generated=%d ttft=%s total=%.3fs finish=%s",
            self.request_id,
            self._endpoint,
            status,
            prompt,
            cached,
            generated,
            first,
            self._now_s() - self._began_s,
            finish,
        )
