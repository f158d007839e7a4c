"""What tests of deployments without Ray share: a checkpoint, and processes that outlive a test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..checkpoints import make_checkpoint
from .crew import Member
from .under_load import LOADS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With loads beside it in which a layer's first expert gets half of the tokens."""
    path = make_checkpoint("olmoe", tmp_path_factory.mktemp("model"))
    config = json.loads((path / "config.json").read_text())
    experts = config["num_experts"]
    counts = [[experts - 1, *([1] * (experts - 1))]] * config["num_hidden_layers"]
    (path / LOADS).write_text(json.dumps({"tokens_per_step": 64, "counts_LE": counts}))
    return path


@pytest.fixture(scope="module")
def crew() -> Iterator[list[Member]]:
    """Processes that are alive, as far as tests have left them: starting six takes longer than most of the tests."""
    Member.all.clear()  # other modules' have ended
    yield Member.all
    for member in Member.all:
        member.end()
    Member.all.clear()


@pytest.fixture
def members(crew: list[Member]) -> list[Member]:
    for member in [member for member in crew if not member.runs]:
        member.end()
        crew.remove(member)
    for _ in range(6 - len(crew)):
        Member()
    return list(crew)
