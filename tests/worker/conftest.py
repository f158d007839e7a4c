"""One tiny model for all tests of workers, and clients that read streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from concertina.workers.model_files import ModelFiles
from concertina.workers.worker import Worker

from ..checkpoints import make_checkpoint
from ..model.loaded import Loaded
from .site import LocalWorker, Site, worker_config


@pytest.fixture(scope="package")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """The model in plain memory, which says what is true."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = make_checkpoint("olmoe", tmp_path_factory.mktemp("worker"), num_hidden_layers=2)
    yield Loaded.open(path, "float32")
    torch.set_num_threads(threads)


@pytest.fixture
def files(loaded: Loaded) -> ModelFiles:
    return loaded.files


@pytest.fixture
def make_site(files: ModelFiles) -> Iterator[Callable[..., Site]]:
    with ExitStack() as stack:

        def make(*devices: str, **fields: Any) -> Site:
            site = Site(files, devices, **fields)
            stack.callback(site.close)
            return site

        yield make


@pytest.fixture
def hire() -> Iterator[Callable[..., LocalWorker]]:
    """Workers in this process, stopped at the end."""
    with ExitStack() as stack:

        def make(**fields: Any) -> LocalWorker:
            worker = LocalWorker(Worker(worker_config(**fields)))
            stack.callback(worker.worker.stop)
            return worker

        yield make
