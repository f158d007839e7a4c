"""A Ray cluster that others use: what cannot be joined, or taken, is told, and what is not ours is let be."""

from __future__ import annotations

import socket
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from concertina.errors import OperatorError
from concertina.orchestrator import endpoint as module
from concertina.orchestrator import remote, serving
from concertina.orchestrator.config import DeploymentConfig
from concertina.orchestrator.endpoint import Endpoint, check_serve
from ray import serve

CONFIG = DeploymentConfig("here", name="mine")


@pytest.mark.parametrize(
    "refusal", [RuntimeError("Version mismatch"), ray.exceptions.AuthenticationError("no token"), ValueError("odd")]
)
def test_a_cluster_that_cannot_be_joined_is_no_traceback(monkeypatch: pytest.MonkeyPatch, refusal: Exception) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise refusal

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(
        OperatorError, match=r"address: the Ray cluster that runs here cannot be joined.*--address local"
    ):
        remote.join_or_start(None, 2, False)
    with pytest.raises(OperatorError, match="address: no Ray cluster answers at 'auto'"):
        remote.connect_to(None)


class Pool:
    """Runs nothing."""

    def submit(self, *_: Any) -> Future[None]:
        return Future()


@pytest.mark.parametrize(
    ("runs_before", "applications", "ends"),
    [
        (False, {"mine"}, "serve"),
        (False, set(), "serve"),
        (False, {"mine", "theirs"}, "mine"),
        (True, {"mine"}, "mine"),
    ],
)
def test_serve_ends_with_the_endpoint_only_if_nobody_else_uses_it(
    monkeypatch: pytest.MonkeyPatch, runs_before: bool, applications: set[str], ends: str
) -> None:
    ended: list[str] = []
    controller = SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: "id"))
    monkeypatch.setattr(remote, "find_controller", lambda name: controller)
    monkeypatch.setattr(module, "_serve_runs", lambda: runs_before)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=dict.fromkeys(applications)))
    monkeypatch.setattr(serve, "shutdown", lambda: ended.append("serve"))
    monkeypatch.setattr(serve, "delete", ended.append)
    Endpoint(CONFIG, None, Pool()).close()  # type: ignore[arg-type]
    assert ended == [ends]


def test_why_an_endpoint_could_not_be_opened_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Deploying failed\n  Traceback\nOperatorError: ingress: checkpoint: no readable tokenizer\n")

    monkeypatch.setattr(remote, "find_controller", lambda name: SimpleNamespace(_actor_id=SimpleNamespace(hex=str)))
    monkeypatch.setattr(module, "_serve_runs", lambda: False)
    monkeypatch.setattr(serve, "start", fail)
    with pytest.raises(OperatorError) as error:
        Endpoint(CONFIG, None, Pool())._open()  # type: ignore[arg-type]
    says = "endpoint: it could not be opened: OperatorError: ingress: checkpoint: no readable tokenizer"
    assert str(error.value) == says


@pytest.mark.parametrize(
    ("runs", "port", "application", "says"),
    [
        (False, 0, "", "taken"),
        (True, 8000, "", None),
        (True, 8000, "mine", None),  # whether it runs is for the name to tell
        (True, 8001, "", "expected its port, 8001"),
        (True, 8000, "theirs", "application 'theirs' answers in this cluster"),
    ],
)
def test_a_serve_that_runs_already(
    monkeypatch: pytest.MonkeyPatch, runs: bool, port: int, application: str, says: str | None
) -> None:
    applications = {application: {"route_prefix": "/"}} if application else {"beside": {"route_prefix": "/beside"}}
    client = SimpleNamespace(
        http_config=SimpleNamespace(port=port), get_serve_details=lambda: {"applications": applications}
    )
    monkeypatch.setattr(module, "_serve_runs", lambda: runs)
    monkeypatch.setattr(module, "_get_global_client", lambda: client)
    if says is None:
        check_serve(CONFIG, OperatorError("taken"))  # by Serve itself
        return
    with pytest.raises(OperatorError, match=says):
        check_serve(CONFIG, OperatorError("taken"))


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"port: cannot listen on 127.0.0.1:{port}" in str(serving._port_taken("127.0.0.1", port))
    assert serving._port_taken("127.0.0.1", port) is None
    assert "port: cannot listen on nowhere.invalid:8000" in str(serving._port_taken("nowhere.invalid", 8000))
