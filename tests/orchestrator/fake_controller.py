"""A controller in memory behind the calls that commands make, in place of a Ray actor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from concertina.errors import OperatorError
from concertina.orchestrator import remote
from concertina.orchestrator.preview import Preview, preview
from concertina.orchestrator.resize import resized
from concertina.orchestrator.status import DeploymentStatus, OperationStatus
from concertina.orchestrator.tokens import WrongToken

from .resize_world import context, layout_of

TOKEN = "t" * 32
DONE = OperationStatus(
    "op-1",
    "scale",
    "2 -> 3 workers",
    "done",
    started_s=10.0,
    committed_s=10.6,
    ended_s=11.4,
    bytes_total=8_000_000,
    bytes_done=8_000_000,
)
RUNNING = replace(DONE, state="running", phase="moving weights", committed_s=0.0, ended_s=0.0, bytes_done=2_000_000)


@dataclass
class FakeController:
    """Answers with ``first``, then, asked for the operation, with one of ``later`` after the other."""

    first: OperationStatus = DONE
    later: list[OperationStatus] = field(default_factory=list)
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    failing: int = 0

    def scale(self, token: str, workers: int, dry_run: bool = False) -> OperationStatus | Preview:
        self.note("scale", token, workers, dry_run)
        if dry_run:
            planned_for = context()
            current = layout_of(planned_for, 2)
            return preview(current, resized(current, workers, planned_for))
        return self.first

    def rebalance(self, token: str) -> OperationStatus:
        self.note("rebalance", token)
        return self.first

    def drain(self, token: str, device: str, deadline_s: float | None = None) -> OperationStatus:
        self.note("drain", token, device, deadline_s)
        return self.first

    def undrain(self, token: str, node: str) -> str:
        self.note("undrain", token, node)
        return node

    def cancel(self, token: str, operation: str) -> OperationStatus:
        self.note("cancel", token, operation)
        return self.first

    def operation(self, token: str, operation: str, wait_s: float = 0.0) -> OperationStatus:
        self.note("operation", token, operation)
        return self.later.pop(0) if self.later else self.first

    def status(self) -> DeploymentStatus:
        self.asked.append(("status",))
        operations = (replace(DONE, id="op-0", state="failed", reason="[no] room"), self.first)
        return DeploymentStatus("mine", "m", "", 1, "serving", "shared", "", 1, 1, 9.0, operations=operations)

    def note(self, method: str, token: str, *args: Any) -> None:
        if self.failing:
            self.failing -= 1
            raise remote.Unavailable("it starts again")
        if token != TOKEN:
            raise WrongToken("token: it is not this deployment's")
        self.asked.append((method, *args))


@dataclass(frozen=True)
class _Handle:
    """Methods with ``remote``, which give a call to be made when its result is asked for."""

    controller: FakeController

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.controller, name)
        return type("Method", (), {"remote": staticmethod(lambda *args: lambda: method(*args))})


def install(monkeypatch: pytest.MonkeyPatch, controller: FakeController) -> FakeController:
    """Let every look for a deployment called "mine" or "concertina" find ``controller``."""

    def find(name: str) -> _Handle:
        if name not in ("mine", "concertina"):
            raise OperatorError(f"name: no deployment called {name!r}; none runs in this cluster")
        return _Handle(controller)

    def ask(call: Callable[[], Any], timeout_s: float | None = None) -> Any:
        return call()

    monkeypatch.setattr(remote, "connect_to", lambda address: None)
    monkeypatch.setattr(remote, "find_controller", find)
    monkeypatch.setattr(remote, "ask", ask)
    monkeypatch.setattr(remote, "_AGAIN_S", 0.0)
    return controller
