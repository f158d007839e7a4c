"""Checkpoints and servers that several tests of the ingress share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from concertina.orchestrator.ingress.settings import IngressSettings

from . import checkpoints
from .toy import Front, ToyWorker


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def piece_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.sentence_piece(tmp_path_factory.mktemp("sentence_piece"))


@pytest.fixture
def serve(checkpoint: Path) -> Iterator[Callable[..., Front]]:
    """Starts servers with ``serve(worker, ..., setting=value)``; all end with the test."""
    with ExitStack() as stack:

        def start(*workers: ToyWorker, **settings: Any) -> Front:
            defaults: dict[str, Any] = {"model_names": ("toy", "alias"), "checkpoint": str(checkpoint)}
            chosen = IngressSettings(**{**defaults, "max_model_len": 200, "worker_wait_s": 0.2, **settings})
            return stack.enter_context(Front(chosen, workers))

        yield start
