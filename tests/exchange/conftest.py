"""One crew of member processes for the session; a test that fails inside it leaves a new one to the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.distributed import TCPStore

from .crew import Crew


@pytest.fixture(scope="session")
def _session_crew() -> Iterator[Crew]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    crew = Crew(store.port)
    yield crew
    crew.end()


@pytest.fixture
def crew(_session_crew: Crew) -> Iterator[Crew]:
    yield _session_crew
    if _session_crew.members:  # the test did not get as far as `leave`: who knows what state they are in
        _session_crew.end()
