"""A worker that is told to emulate steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from concertina.workers.worker import Worker

from ..model.loaded import Loaded
from .site import LocalWorker, Site, bring, worker_config
from .streams import clients

PROMPT = [5, 6, 7, 8]


@pytest.mark.parametrize("emulated_step_ms", [0.0, 1.0])
def test_its_engine_emulates_them_and_its_tokens_are_true(
    make_site: Callable[..., Site], loaded: Loaded, emulated_step_ms: float
) -> None:
    site, worker = make_site("a"), LocalWorker(Worker(worker_config(emulated_step_ms=emulated_step_ms)))
    try:
        bring([worker], site.generation(["a"], "solo"))
        service = worker.worker._service
        assert service is not None
        assert service.engine.config.emulated_step_ms == emulated_step_ms
        with clients() as client:
            stream = client.start(worker, PROMPT, 12)
            assert stream.finished() == "length"
            assert stream.tokens == loaded.greedy(PROMPT, 12)
    finally:
        worker.worker.stop()
