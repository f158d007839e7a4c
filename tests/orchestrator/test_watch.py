"""What ``concertina serve`` does about its controller, with calls and time of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from concertina.errors import InternalError
from concertina.orchestrator import remote, serving
from concertina.orchestrator.config import DeploymentConfig

CONFIG = DeploymentConfig(checkpoint="model", hang_timeout_s=20.0)
CONTROLLER = SimpleNamespace(
    alive=SimpleNamespace(remote=lambda: "alive"), check=SimpleNamespace(remote=lambda: "check")
)
OK, SILENT, AWAY, FAILED = None, remote.Silent("silent"), remote.Unavailable("away"), InternalError("failed")


class World:
    """Answers in order, the last one for ever; a silent call takes its whole time-out, others a second."""

    def __init__(self, answers: list[tuple[str, Exception | None]]) -> None:
        self.now_s, self.ended, self._answers = 0.0, 0, answers
        self._last: Iterator[tuple[str, Exception | None]] = iter(answers)

    def ask(self, reference: str, timeout_s: float) -> None:
        assert self.now_s < 1000, "it goes on for ever"
        call, error = next(self._last, (reference, self._answers[-1][1]))
        assert call == reference
        self.now_s += timeout_s if isinstance(error, remote.Silent) else 1.0
        if error is not None:
            raise error

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def end_controller(self, deployment: str) -> bool:
        assert deployment == CONFIG.name
        self.ended += 1
        return True

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(remote, "ask", self.ask)
        monkeypatch.setattr(serving, "time", SimpleNamespace(monotonic=lambda: self.now_s, sleep=self.sleep))
        monkeypatch.setattr(serving, "_end_controller", self.end_controller)
        with pytest.raises(InternalError) as e:
            serving._watch(CONTROLLER, CONFIG)
        return e.value


@pytest.mark.parametrize(
    ("answers", "ended"),
    [
        pytest.param([("alive", OK), ("check", OK)], 0, id="never"),
        pytest.param([("alive", OK), ("check", SILENT)], 0, id="it takes up its processes"),
        pytest.param([("alive", SILENT), ("check", AWAY)], 1, id="between two looks"),
        pytest.param([("alive", OK), ("check", SILENT), ("alive", SILENT), ("check", AWAY)], 1, id="within a look"),
    ],
)
def test_one_that_hangs_is_ended_whenever_it_does_so(
    monkeypatch: pytest.MonkeyPatch, answers: list[tuple[str, Exception | None]], ended: int
) -> None:
    world = World(
        [*answers, ("alive", AWAY), ("check", AWAY), ("alive", OK), ("check", OK), ("alive", OK), ("check", FAILED)]
    )
    assert world.watch(monkeypatch) is FAILED
    assert world.ended == ended


def test_one_that_stays_away_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World([("alive", OK), ("check", OK), ("alive", AWAY), ("check", AWAY)])
    assert world.watch(monkeypatch) is AWAY
    assert CONFIG.hang_timeout_s + remote.PATIENCE_S < world.now_s < CONFIG.hang_timeout_s + remote.PATIENCE_S + 10
    assert world.ended == 0


def test_one_whose_successors_hang_too_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World([("alive", OK), ("check", OK), ("alive", SILENT), ("check", SILENT)])
    assert world.watch(monkeypatch) is SILENT
    assert world.ended > 1
