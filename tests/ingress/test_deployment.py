"""The ingress inside a real Ray Serve, with workers' real frontends behind it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from concertina.orchestrator.demo import free_port
from concertina.orchestrator.ingress.members import Member
from concertina.orchestrator.ingress.settings import IngressSettings
from concertina.orchestrator.status import MemberList, WorkerAddress
from openai import APIError, BadRequestError, OpenAI

from .toy import ToyEngine

pytestmark = pytest.mark.ray
BODY: dict[str, Any] = {"model": "toy", "prompt": [9], "max_tokens": 200, "seed": 3}


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(0.02)


@pytest.fixture
def engines() -> Iterator[list[ToyEngine]]:
    engines = [ToyEngine(), ToyEngine()]
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture
def port(checkpoint: Path, engines: list[ToyEngine]) -> Iterator[int]:
    import ray  # here, because it costs seconds
    from concertina.orchestrator.ingress.deployment import ActorMembers, Lifeline, build_ingress
    from ray import serve

    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False, namespace="test", log_to_driver=False)
    try:

        class Controller:
            def __init__(self, addresses: list[WorkerAddress]) -> None:
                self.addresses = addresses
                self.version = 0

            def drop(self, port: int) -> None:
                self.addresses = [a for a in self.addresses if a.port != port]
                self.version += 1

            async def members(self, seen: int) -> MemberList:
                for _ in range(200):
                    if self.version != seen:
                        break
                    await asyncio.sleep(0.005)
                return MemberList(self.version, tuple(self.addresses))

        addresses = [WorkerAddress(f"w{i}", "127.0.0.1", e.frontend.port) for i, e in enumerate(engines)]
        options = {"name": "controller", "num_cpus": 0, "max_restarts": -1}
        controller = ray.remote(Controller).options(**options).remote(addresses)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = IngressSettings(("toy",), str(checkpoint), 100_000, worker_wait_s=20)
        source = ActorMembers("controller", "test", "secret")
        lifeline = Lifeline("controller", "test", controller._actor_id.hex(), "toy", True, every_s=0.05)
        serve.run(build_ingress(settings, source, lifeline=lifeline), name="toy", route_prefix="/")
        yield port
        ray.kill(controller)
    finally:
        serve.shutdown()
        ray.shutdown()


def test_no_answer_of_the_cluster_does_not_end_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from concertina.orchestrator.ingress.deployment import Lifeline

    def unknown(*_: object) -> None:
        raise ray.exceptions.RpcError("the cluster gives no answer")

    lifeline = Lifeline("controller", "test", "its id", "toy", False, every_s=0.0)
    monkeypatch.setattr(ray, "get_actor", unknown)
    assert lifeline._find() == "its id"
    monkeypatch.setattr(ray, "get_actor", lambda *_: (_ for _ in ()).throw(ValueError("no such actor")))
    assert lifeline._find() is None


def test_members_are_what_the_controller_says_of_them() -> None:
    from concertina.orchestrator.ingress.deployment import ActorMembers

    listed = (WorkerAddress("w0", "host", 1, "cpu-0", speed=0.25), WorkerAddress("w1", "host", 2, "cpu-1", True))
    roster = ActorMembers("controller", "test", "secret")._roster(MemberList(1, listed))
    assert roster.members == (
        Member("w0", "host", 1, "secret", speed=0.25, device="cpu-0"),
        Member("w1", "host", 2, "secret", draining=True, device="cpu-1"),
    )


@pytest.mark.parametrize(("then", "deleted"), [("", True), ("another's id", False)])
def test_an_endpoint_whose_controller_is_another_one_is_that_ones(
    monkeypatch: pytest.MonkeyPatch, then: str, deleted: bool
) -> None:
    """What serves next under its name runs the application anew; nobody else may delete it."""
    from concertina.orchestrator.ingress import deployment
    from concertina.orchestrator.ingress.deployment import Lifeline
    from ray import serve

    answers = iter(["its id", "", "its id", "", "", then])  # one that is late, then the end
    gone: list[str] = []
    monkeypatch.setattr(Lifeline, "_find", lambda self: next(answers) or None)
    monkeypatch.setattr(
        deployment, "Durable", lambda name: SimpleNamespace(clear=lambda: gone.append(f"state of {name}"))
    )
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={"toy": 0, "another": 0}))
    monkeypatch.setattr(serve, "shutdown", lambda: pytest.fail("another application runs there"))
    monkeypatch.setattr(serve, "delete", lambda name, _blocking: gone.append(name))
    Lifeline("controller", "test", "its id", "toy", True, every_s=0.0).watch()
    assert gone == (["state of toy", "toy"] if deleted else [])


def test_serve(port: int, engines: list[ToyEngine]) -> None:
    """Answers, errors, a client that leaves and whatever can be lost, through Serve's proxy."""
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, timeout=60)
    whole = client.completions.create(**BODY)
    parts = list(client.completions.create(**BODY, stream=True))
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
    assert len(parts) > 5, "it streams"
    with pytest.raises(BadRequestError):
        client.completions.create(model="toy", prompt="")
    check_disconnect(port, engines, stream=True)
    check_disconnect(port, engines, stream=False)
    check_replica_killed(client, engines, whole.choices[0].text)
    check_controller_restarts(client, whole.choices[0].text)
    check_worker_lost(client, engines, whole.choices[0].text)


def check_worker_lost(client: OpenAI, engines: list[ToyEngine], expected: str) -> None:
    import ray

    stream = client.completions.create(**BODY, stream=True)
    text = next(stream).choices[0].text
    lost = next(e for e in engines if e.load.running)
    lost.frontend.close()
    ray.get(ray.get_actor("controller", "test").drop.remote(lost.frontend.port))
    assert text + "".join(p.choices[0].text for p in stream) == expected


def check_replica_killed(client: OpenAI, engines: list[ToyEngine], expected: str) -> None:
    """Workers drop its sequences at once, and a retry is served by its successor."""
    stream = client.completions.create(**{**BODY, "max_tokens": 90_000}, stream=True)
    next(stream)
    kill("SERVE_REPLICA::toy")
    until(lambda: sum(e.load.running for e in engines) == 0)
    with pytest.raises((APIError, httpx.HTTPError)):
        list(stream)
    assert answered(client) == expected


def check_controller_restarts(client: OpenAI, expected: str) -> None:
    """It serves on meanwhile, and is not taken for gone, although it may be away for long."""
    import ray

    for _ in range(2):
        killed = kill("controller")
        while pid_of("controller") in (0, killed):
            ray.get_actor("controller", "test")  # Ray knows it all the time
            assert answered(client) == expected
    assert answered(client) == expected


def answered(client: OpenAI) -> str:
    end_s = time.monotonic() + 60
    while True:
        try:
            return client.completions.create(**BODY).choices[0].text
        except APIError:
            assert time.monotonic() < end_s
            time.sleep(0.05)


def kill(name: str) -> int:
    until(lambda: pid_of(name) > 0)
    pid = pid_of(name)
    os.kill(pid, signal.SIGKILL)
    return pid


def pid_of(name: str) -> int:
    """Process of the one living actor whose name begins like this; 0 while there is none."""
    from ray._private.state import actors

    table: dict[str, dict[str, Any]] = actors()
    alive = [a for a in table.values() if a["State"] == "ALIVE" and a["Name"].startswith(name)]
    return int(alive[0]["Pid"]) if alive else 0


def check_disconnect(port: int, engines: list[ToyEngine], stream: bool) -> None:
    raw = json.dumps({**BODY, "max_tokens": 90_000, "n": 2, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
        sock.sendall(head.encode() + raw)
        if stream:
            assert sock.recv(20).startswith(b"HTTP/1.1 200")
        until(lambda: sum(e.load.running for e in engines) == 2)
    until(lambda: sum(e.load.running for e in engines) == 0)
