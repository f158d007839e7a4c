"""The controller's shell over hands in memory: when it tries again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from concertina.errors import InternalError
from concertina.orchestrator import controller
from concertina.orchestrator.core import attempts

from ..checkpoints import make_checkpoint
from .test_elastic_controller import controlled, done


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))


def test_the_end_of_a_pause_wakes_the_controller(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else does: everybody is silent."""
    monkeypatch.setattr(controller, "_TICK_S", 1000.0)

    async def go() -> None:
        async with controlled(checkpoint, 1) as (deployment, hands, token):
            hands.faults.errors["prepare"] = InternalError("a cable came loose")
            ended = await done(deployment, token, await deployment.scale(token, 2))
            assert (ended.state, ended.reason) == ("failed", "a cable came loose")
            assert hands.faults.calls.count("prepare") > 2

    asyncio.run(go())


def test_who_asks_while_what_serves_is_broken_learns_that_it_recovers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_RECOVERY_PAUSE_S", 0.01)

    async def go() -> None:
        async with controlled(checkpoint, 2) as (deployment, hands, _):
            hands.faults.errors["prepare"] = InternalError("a cable came loose")
            hands.workers[1].dead = True
            hands.workers[0].parked = "PeerLost"
            phases = set()
            while not deployment._state.failure:
                phases.add((await deployment.status()).phase)
                await asyncio.sleep(0.01)
            assert phases - {"serving", "failed"} == {"recovering"}
            assert deployment._state.failure == "a cable came loose"

    asyncio.run(go())
