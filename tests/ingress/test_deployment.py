"""The ingress inside a real Ray Serve, with workers' real frontends behind it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from concertina.orchestrator.ingress.settings import IngressSettings
from concertina.orchestrator.status import WorkerAddress
from openai import BadRequestError, OpenAI

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
    from concertina.orchestrator.ingress.deployment import ActorMembers, build_ingress
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    ray.init(num_cpus=2, include_dashboard=False, namespace="test", log_to_driver=False)
    try:

        class Controller:
            def __init__(self, addresses: list[WorkerAddress]) -> None:
                self.addresses = addresses

            def members(self) -> list[WorkerAddress]:
                return self.addresses

        addresses = [WorkerAddress(f"w{i}", "127.0.0.1", e.frontend.port) for i, e in enumerate(engines)]
        controller = ray.remote(Controller).options(name="controller", num_cpus=0).remote(addresses)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = IngressSettings(("toy",), str(checkpoint), 100_000, worker_wait_s=20)
        serve.run(build_ingress(settings, ActorMembers("controller", "test", "secret")), name="toy", route_prefix="/")
        yield port
        ray.kill(controller)
    finally:
        serve.shutdown()
        ray.shutdown()


def test_serve(port: int, engines: list[ToyEngine]) -> None:
    """Answers, errors, a client that leaves and a worker that is lost, through Serve's proxy."""
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, timeout=60)
    whole = client.completions.create(**BODY)
    parts = list(client.completions.create(**BODY, stream=True))
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
    assert len(parts) > 5, "it streams"
    with pytest.raises(BadRequestError):
        client.completions.create(model="toy", prompt="")
    check_disconnect(port, engines, stream=True)
    check_disconnect(port, engines, stream=False)

    stream = client.completions.create(**BODY, stream=True)
    text = next(stream).choices[0].text
    next(e for e in engines if e.load.running).frontend.close()
    assert text + "".join(p.choices[0].text for p in stream) == whole.choices[0].text


def check_disconnect(port: int, engines: list[ToyEngine], stream: bool) -> None:
    raw = json.dumps({**BODY, "max_tokens": 90_000, "n": 2, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
        sock.sendall(head.encode() + raw)
        if stream:
            assert sock.recv(20).startswith(b"HTTP/1.1 200")
        until(lambda: sum(e.load.running for e in engines) == 2)
    until(lambda: sum(e.load.running for e in engines) == 0)
