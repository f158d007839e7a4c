"""What a change of size is held against while nothing else runs: the command started anew, and a bare copy."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from statistics import median
from typing import Any

from concertina.orchestrator.config import DeploymentConfig
from concertina.orchestrator.demo import free_port

from .httpload import Endpoint, first_token_s, server

Row = dict[str, Any]
_MODEL = "model"
_PROMPT = range(4, 36)  # ordinary tokens of every checkpoint here
_COPIES = 3


def serve_restarts(config: DeploymentConfig, changes: Sequence[int]) -> Iterator[Row]:
    """From Ctrl-C to ``concertina serve`` until the first streamed token of one with another number of workers.

    That is what an operator has who cannot resize: its Ray and its endpoint end and start with it.
    """
    endpoint = Endpoint(free_port(), _MODEL)
    with ExitStack() as running:
        _start(running, config, endpoint, config.workers, time.perf_counter())
        for before, workers in pairwise((config.workers, *changes)):
            began_s = time.perf_counter()
            running.close()
            serving_s = _start(running, config, endpoint, workers, began_s)
            yield {"case": "serve_restart", "change": f"{before}_to_{workers}", "serving_s": serving_s}


def _start(running: ExitStack, config: DeploymentConfig, endpoint: Endpoint, workers: int, began_s: float) -> float:
    process = running.enter_context(server(_command(config, endpoint, workers), dict(os.environ)))
    return first_token_s(endpoint, process, began_s, list(_PROMPT))


def _command(config: DeploymentConfig, endpoint: Endpoint, workers: int) -> list[str]:
    options = {
        "workers": workers,
        "address": "local",
        "name": config.name,
        "port": endpoint.port,
        "served-model-name": endpoint.model,
        "memory": config.memory_mode,
        "device-memory": config.device_memory_bytes,
        "rebalance-interval": config.rebalance_s,
        "max-model-len": config.engine.max_model_len,
        "block-tokens": config.engine.block_tokens,
        "threads": config.engine.threads,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    if config.reserve_memory:
        given.append("--reserve-memory")
    if config.engine.emulated_step_ms:
        given.append(f"--emulated-step-ms={config.engine.emulated_step_ms}")
    return [sys.executable, "-m", "concertina", "serve", config.checkpoint, *given]


def bare_copies(changed: Sequence[Row]) -> Iterator[Row]:
    """For every change that moved bytes, what one thread takes to copy as many into new pages, within the kernel."""
    planned = {row["change"]: row["planned_bytes"] for row in changed if row["planned_bytes"]}
    for change, nbytes in planned.items():
        source = _filled(nbytes)
        try:
            copy_s = median(_copy_s(source, nbytes) for _ in range(_COPIES))
        finally:
            os.close(source)
        yield {"case": "bare_copy", "change": change, "copy_s": copy_s}


def _filled(nbytes: int) -> int:
    fd = os.memfd_create("elasticity-copy-from")
    block = os.urandom(1 << 20)
    for offset in range(0, nbytes, len(block)):
        os.pwrite(fd, block[: nbytes - offset], offset)
    return fd


def _copy_s(source: int, nbytes: int) -> float:
    fd, done = os.memfd_create("elasticity-copy-to"), 0
    try:
        os.ftruncate(fd, nbytes)
        began_s = time.perf_counter()
        while done < nbytes:
            done += os.copy_file_range(source, fd, nbytes - done, done, done)
        return time.perf_counter() - began_s
    finally:
        os.close(fd)
