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
from concertina.orchestrator import remote
from concertina.orchestrator.config import DeploymentConfig, EndpointOptions
from concertina.orchestrator.endpoint import Endpoint, check_port_free, check_serve
from ray import serve

CONFIG = DeploymentConfig("here", name="mine")


@pytest.mark.parametrize(
    "refusal",
    [
        RuntimeError("Version mismatch: the cluster has\n    Ray: 2.60"),
        ray.exceptions.AuthenticationError("no token"),
        ValueError("odd"),
    ],
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


def an_endpoint(monkeypatch: pytest.MonkeyPatch, serves: dict[str, str] | None) -> Endpoint:
    controller = SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: "id"))
    monkeypatch.setattr(remote, "find_controller", lambda name: controller)
    monkeypatch.setattr(module, "_applications", lambda: serves)
    return Endpoint(CONFIG, None, Pool())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "ends"),
    [
        (None, {"mine": "/"}, "serve"),
        (None, None, "serve"),
        (None, {"mine": "/", "theirs": "/theirs"}, "mine"),
        ({}, {"mine": "/"}, "mine"),
    ],
)
def test_serve_ends_with_the_endpoint_only_if_nobody_else_uses_it(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, str] | None, after: dict[str, str] | None, ends: str
) -> None:
    ended: list[str] = []
    endpoint = an_endpoint(monkeypatch, before)
    monkeypatch.setattr(module, "_applications", lambda: after)
    monkeypatch.setattr(serve, "shutdown", lambda: ended.append("serve"))
    monkeypatch.setattr(serve, "delete", ended.append)
    endpoint.close()
    assert ended == [ends]


@pytest.mark.parametrize("told", [True, False])
def test_why_an_endpoint_could_not_be_opened_is_one_line(monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Deploying application mine failed:\n  Failed to update the deployments ['ingress'].")

    why = "OperatorError: ingress: checkpoint: no readable tokenizer"
    ingress = SimpleNamespace(message=f"It failed to start 3 times in a row. Error:\n  Traceback\n{why}\n\n")
    mine = SimpleNamespace(deployments={"ingress": ingress} if told else {})
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={"mine": mine}))
    monkeypatch.setattr(serve, "start", fail)
    with pytest.raises(OperatorError) as error:
        an_endpoint(monkeypatch, None)._open()
    rest = why if told else "Deploying application mine failed: Failed to update the deployments ['ingress']."
    assert str(error.value) == f"endpoint: it could not be opened: {rest}"


@pytest.mark.parametrize(
    ("serves", "port", "says"),
    [
        ({}, 8000, None),
        ({"mine": "/", "beside": "/beside"}, 8000, None),  # whether it runs is for the name to tell
        ({}, 8001, "expected its port, 8001"),
        ({"theirs": "/"}, 8000, "application 'theirs' answers in this cluster"),
    ],
)
def test_a_serve_that_runs_already(
    monkeypatch: pytest.MonkeyPatch, serves: dict[str, str], port: int, says: str | None
) -> None:
    monkeypatch.setattr(module, "_applications", lambda: serves)
    monkeypatch.setattr(module, "_has_controller", lambda name: True)
    monkeypatch.setattr(module, "_ask_serve", lambda call: SimpleNamespace(port=port))
    monkeypatch.setattr(module, "check_port_free", lambda endpoint: pytest.fail("Serve itself listens there"))
    if says is None:
        check_serve(CONFIG)
        return
    with pytest.raises(OperatorError, match=says):
        check_serve(CONFIG)


def test_the_endpoint_of_a_killed_driver_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str] | None] = [{"mine": "/"}, {"mine": "/"}, None]
    checked: list[object] = []
    monkeypatch.setattr(module, "_applications", lambda: seen.pop(0))
    monkeypatch.setattr(module, "_has_controller", lambda name: False)
    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    monkeypatch.setattr(module, "check_port_free", checked.append)
    check_serve(CONFIG)
    assert (seen, checked) == ([], [CONFIG.endpoint])
    monkeypatch.setattr(module, "_applications", lambda: {"mine": "/"})
    monkeypatch.setattr(module, "_LEFTOVER_S", 0.0)
    with pytest.raises(OperatorError, match="an earlier deployment called 'mine' does not go away"):
        check_serve(CONFIG)


def test_a_serve_that_gives_no_answer_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(call: str) -> None:
        raise ray.exceptions.GetTimeoutError("nothing\ncame")

    monkeypatch.setattr(module, "_ask_serve", silent)
    with pytest.raises(OperatorError, match="Ray Serve runs in this cluster and gives no answer: nothing came"):
        check_serve(CONFIG)
    monkeypatch.setattr(module, "_ask_serve", lambda call: (_ for _ in ()).throw(ValueError("no such actor")))
    assert module._applications() is None


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OperatorError, match=rf"port: cannot listen on 127\.0\.0\.1:{port}"):
            check_port_free(EndpointOptions("127.0.0.1", port))
    check_port_free(EndpointOptions("127.0.0.1", port))
    with pytest.raises(OperatorError, match=r"port: cannot listen on nowhere\.invalid:8000"):
        check_port_free(EndpointOptions("nowhere.invalid"))
    assert EndpointOptions("::1").url == "http://[::1]:8000"
