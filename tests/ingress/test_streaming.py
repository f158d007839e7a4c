"""Clients that are slow, that leave, and workers that die: over HTTP, and over the workers' real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from concertina.orchestrator.ingress.answer import EventWriter, Head
from concertina.orchestrator.ingress.completions import Completions
from concertina.orchestrator.ingress.fields import Fields
from concertina.orchestrator.ingress.generation import Generation
from concertina.orchestrator.ingress.members import Member, connect_worker
from concertina.orchestrator.ingress.router import Router
from concertina.orchestrator.ingress.settings import IngressSettings
from concertina.orchestrator.ingress.tokenizer import Tokenizer
from openai import OpenAI, Stream
from openai.types import Completion

from .toy import Front, ToyEngine, ToyWorker, connect_to

Serve = Callable[..., Front]
BODY = {"model": "toy", "prompt": [9], "max_tokens": 20, "seed": 3, "stream": True}


def client_of(front: Front) -> OpenAI:
    return OpenAI(base_url=f"{front.url}/v1", api_key="x", max_retries=0, timeout=20)


def connect_raw(front: Front, body: dict[str, object], path: str = "/v1/completions") -> socket.socket:
    """A connection on which a request was sent."""
    host, port = front.url.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    sock = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    sock.sendall(head.encode() + raw)
    return sock


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("after_tokens", [False, True])
def test_a_client_that_leaves_frees_everything(serve: Serve, stream: bool, path: str, after_tokens: bool) -> None:
    """I5: all its sequences are aborted, whether it streamed, whether tokens had come."""
    worker = ToyWorker(step_s=0.005)
    front = serve(worker, max_model_len=100_000)
    if not after_tokens:
        front.run(worker.gate.clear)
    chat = [{"role": "user", "content": "x"}]
    body = {**BODY, "messages": chat, "n": 3, "stream": stream, "max_tokens": 90_000}
    if path == "/v1/chat/completions":
        del body["prompt"]
    sequences = 3 if after_tokens else 1
    sock = connect_raw(front, body, path)
    front.until(lambda: len(worker.requests) == sequences and (not after_tokens or worker.outputs > 5))
    if stream and after_tokens:
        assert sock.recv(20).startswith(b"HTTP/1.1 200")
    sock.close()
    front.until(lambda: len(worker.aborted) == sequences)
    front.until(lambda: all(lane.outstanding == lane.sequences == 0 for lane in front.router.lanes))
    assert {r.id for r in worker.requests} == set(worker.aborted)
    gone = f'concertina_requests_total{{endpoint="{path}",status="499"}} 1.0'
    front.until(lambda: gone in metrics_of(front))
    assert "concertina_running 0.0" in metrics_of(front)
    assert "concertina_waiting 0.0" in metrics_of(front)


def metrics_of(front: Front) -> str:
    return str(front.app.state.service.metrics.render().decode())


class Silent:
    def submitted(self) -> None: ...
    def progressed(self, tokens: int, gap_s: float | None) -> None: ...
    def ended(self, had_tokens: bool) -> None: ...


def test_a_choice_ends_once(checkpoint: Path) -> None:
    """Its last tokens may come between the first look at it and the first write."""

    async def main() -> None:
        tokenizer = Tokenizer.load(str(checkpoint))
        worker = ToyWorker()
        router = Router(connect_to([worker]))
        router.update([worker.member])
        endpoint = Completions()
        job = await endpoint.read(Fields({**BODY, "max_tokens": 2}), tokenizer, 100, 1)
        generation = Generation("x", job, router, tokenizer, Silent())
        writer = EventWriter(endpoint, Head("x", 0, "toy"), job, tokenizer.vocabulary)
        updates = generation.updates()
        first = await anext(updates)
        async with asyncio.timeout(20):
            while generation.choices[0].finish is None:
                await asyncio.sleep(0.001)
        written = writer.events(first) + b"".join([writer.events(changed) async for changed in updates])
        assert written.count(b'"finish_reason": "length"') == written.count(b"data:") == 1
        await router.close()

    asyncio.run(main())


def test_what_came_meanwhile_is_one_write(checkpoint: Path) -> None:
    """A reader who comes back late finds one event per choice, with all its text."""

    async def main() -> None:
        tokenizer = Tokenizer.load(str(checkpoint))
        worker = ToyWorker()
        router = Router(connect_to([worker]))
        router.update([worker.member])
        job = await Completions().read(Fields({**BODY, "n": 2}), tokenizer, 100, 1)
        generation = Generation("x", job, router, tokenizer, Silent())
        updates = generation.updates()
        first = await anext(updates)
        assert len(first) == 1
        for choice in first:
            choice.take()
        async with asyncio.timeout(20):
            while generation.completion_tokens < 40:
                await asyncio.sleep(0.001)
        changed = await anext(updates)
        assert [c.index for c in changed] == [0, 1]
        pieces = [c.take() for c in changed]
        assert all(p.finish == "length" and p.text for p in pieces)
        assert [c async for c in updates] == []
        await router.close()

    asyncio.run(main())


def test_events_are_plain_lines(serve: Serve) -> None:
    """ASCII lines of data only, then [DONE]; nothing that a client could take for the end of a line."""
    with httpx.stream("POST", f"{serve(ToyWorker()).url}/v1/completions", json=BODY) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        raw = answer.read()
    events = raw.decode("ascii").split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert event.startswith("data: {")
        data = json.loads(event.removeprefix("data: "))
        assert set(data) == {"id", "object", "created", "model", "choices"}
        assert set(data["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}


def test_a_lost_worker_is_only_a_pause(serve: Serve) -> None:
    calm = client_of(serve(ToyWorker())).completions.create(**{**BODY, "stream": False, "n": 2})  # type: ignore[call-overload]
    workers = [ToyWorker("w0", die_after=7), ToyWorker("w1", die_after=9), ToyWorker("w2")]
    front = serve(*workers)
    front.until(lambda: all(lane.connected for lane in front.router.lanes))
    for worker in workers[:2]:
        worker.on_death = lambda: front.router.update([w.member for w in workers if not w.down])
    parts = list(client_of(front).completions.create(**{**BODY, "n": 2}))  # type: ignore[call-overload]
    for index in (0, 1):
        text = "".join(p.choices[0].text for p in parts if p.choices[0].index == index)
        assert text == calm.choices[index].text
    assert workers[0].down


def test_one_line_in_the_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "concertina.ingress")
    front = serve(ToyWorker(cached_tokens=1))
    answer = client_of(front).completions.create(model="toy", prompt=[9], max_tokens=4)
    httpx.post(f"{front.url}/v1/completions", json={"model": "no", "prompt": "x"})
    good, bad = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert good.startswith(f"{answer.id} /v1/completions 200 prompt=1 cached=1 generated=4 ttft=0.")
    assert good.endswith("finish=length")
    assert "/v1/completions 404 " in bad
    assert "ttft=-" in bad
    assert bad.endswith("finish=model_not_found")


@contextmanager
def real_sockets(checkpoint: Path, engines: list[ToyEngine]) -> Iterator[Front]:
    """A server whose workers are reached over TCP."""
    settings = IngressSettings(("toy",), str(checkpoint), 5000)
    front = Front(settings, [], connect_worker)
    try:
        with front:
            front.run(front.router.update, members_of(engines))
            front.until(lambda: all(lane.connected for lane in front.router.lanes))
            yield front
    finally:
        for engine in engines:
            engine.close()


def members_of(engines: list[ToyEngine]) -> list[Member]:
    return [Member(f"w{i}", "127.0.0.1", e.frontend.port, "secret", device=f"d{i}") for i, e in enumerate(engines)]


def test_over_real_sockets(checkpoint: Path) -> None:
    """Answers, a hand-over, a worker lost in mid-stream and a client that leaves, through the workers' own protocol."""
    engines = [ToyEngine(), ToyEngine()]
    with real_sockets(checkpoint, engines) as front:
        client = client_of(front)
        body = {**BODY, "max_tokens": 200}
        calm = "".join(p.choices[0].text for p in client.completions.create(**body))  # type: ignore[call-overload]
        check_hand_over(client.completions.create(**body), engines, calm)  # type: ignore[call-overload]
        stream = client.completions.create(**body)  # type: ignore[call-overload]
        text = next(stream).choices[0].text
        busy = next(e for e in engines if e.load.running)
        busy.frontend.close()
        front.run(front.router.update, [m for m in members_of(engines) if m.port != busy.frontend.port])
        text += "".join(p.choices[0].text for p in stream)
        assert text == calm
        other = next(e for e in engines if e is not busy)
        assert len(other.requests[-1].prompt) > 1, "it went on behind the tokens that had come"
        before = len(other.aborted)
        sock = connect_raw(front, {**BODY, "max_tokens": 4000, "n": 2})
        front.until(lambda: other.load.running == 2)
        sock.close()
        front.until(lambda: len(other.aborted) == before + 2 and other.load.running == 0)


def check_hand_over(stream: Stream[Completion], engines: list[ToyEngine], expected: str) -> None:
    parts = [next(stream)]
    leaver = next(e for e in engines if e.load.running)
    heir = next(e for e in engines if e is not leaver)
    leaver.hand_over(f"d{engines.index(heir)}")
    parts += stream
    assert "".join(p.choices[0].text for p in parts) == expected
    assert {p.choices[0].finish_reason for p in parts} == {None, "length"}
    assert len(heir.requests[-1].prompt) > 1
