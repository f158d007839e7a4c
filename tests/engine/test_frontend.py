"""Frontend and client over real sockets: streams, refusals, strangers, broken frames, clients that go away."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import msgpack
import pytest
from concertina.errors import OperatorError, PeerLost
from concertina.workers import frames
from concertina.workers.client import WorkerClient
from concertina.workers.engine.engine import Engine
from concertina.workers.engine.errors import InvalidRequest, NeverFits, QueueFull
from concertina.workers.frontend import Frontend, FrontendLimits
from concertina.workers.model.batch import Batch
from concertina.workers.protocol import (
    EngineOutput,
    EngineRequest,
    SamplingParams,
    TokenLogprob,
    output_from_wire,
    output_to_wire,
    request_from_wire,
    request_to_wire,
)

from .fakes import FakeDecoder, FakeKV, Hub, config, expected_greedy, request

TOKEN = "a secret"
PROMPT = [4, 2, 7]
LONG = 60


class Worker:
    """An engine on the toy model behind a frontend.

    The model waits while ``gate`` is cleared; with ``single`` each opening lets one step through.
    """

    def __init__(self, limits: FrontendLimits | None = None, **setting: int) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.single = False
        (exchange,) = Hub(1).members()
        decoder = FakeDecoder(hook=self._pass)
        self.engine = Engine(decoder, FakeKV(400), exchange, config(**setting))  # type: ignore[arg-type]
        self.frontend = Frontend(self.engine, "127.0.0.1", 0, TOKEN, limits)
        self.thread = threading.Thread(target=self.engine.run, args=(self.frontend.emit,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.gate.set()
        self.engine.stop()
        self.thread.join(20)
        self.frontend.close()
        assert not self.thread.is_alive()

    async def has(self, requests: int) -> None:
        """Until the engine has so many requests."""
        async with asyncio.timeout(20):
            while (load := self.engine.load).waiting + load.running != requests:
                await asyncio.sleep(0.001)

    async def idle(self) -> None:
        """Until nothing is left of any request."""
        async with asyncio.timeout(20):
            while (load := self.engine.load).waiting + load.running + load.kv_blocks_used:
                await asyncio.sleep(0.005)

    def _pass(self, batch: Batch) -> None:
        assert self.gate.wait(20)
        if self.single:
            self.gate.clear()


@contextmanager
def serving(limits: FrontendLimits | None = None, **setting: int) -> Iterator[Worker]:
    worker = Worker(limits, **setting)
    try:
        yield worker
    finally:
        worker.close()


@asynccontextmanager
async def connected(worker: Worker) -> AsyncIterator[WorkerClient]:
    client = await WorkerClient.connect("127.0.0.1", worker.frontend.port, TOKEN)
    try:
        yield client
    finally:
        await client.close()


async def tokens_of(client: WorkerClient, r: EngineRequest) -> list[int]:
    got: list[int] = []
    async for output in client.submit(r):
        assert output.id == r.id
        got += output.token_ids
    return got


def run(main: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await main

    asyncio.run(limited())


def test_fifty_streams_at_once_over_two_connections() -> None:
    async def main() -> None:
        async with connected(worker) as one, connected(worker) as two:
            requests = [request("same id", [i % 10, *PROMPT], max_tokens=5 + i % 7) for i in range(50)]
            got = await asyncio.gather(*(tokens_of((one, two)[i % 2], r) for i, r in enumerate(requests)))
            assert got == [expected_greedy(r.prompt, r.sampling.max_tokens) for r in requests]
            await worker.idle()

    with serving(max_running=16) as worker:
        run(main())


def test_outputs_carry_everything_and_the_load_follows() -> None:
    async def main() -> None:
        async with connected(worker) as client, connected(worker) as onlooker:
            assert (client.load.kv_blocks, client.load.running) == (400, 0)
            worker.gate.clear()
            outputs: list[EngineOutput] = []

            async def collect() -> None:
                async for output in client.submit(request("x", PROMPT, max_tokens=3, logprobs=2)):
                    outputs.append(output)
                    if len(outputs) == 1:
                        assert client.load.running == 1

            task = asyncio.create_task(collect())
            await worker.has(1)
            worker.gate.set()
            await task
            assert [t for o in outputs for t in o.token_ids] == expected_greedy(PROMPT, 3)
            logprobs = [p for o in outputs for p in o.logprobs]
            assert len(logprobs) == 3
            assert all(len(p.top) == 2 and p.top[0][1] == p.logprob for p in logprobs)
            assert outputs[-1].finish_reason == "length"
            while onlooker.load.running or not onlooker.load.kv_blocks:
                await asyncio.sleep(0.001)

    with serving() as worker:
        run(main())


def test_what_waits_for_a_slow_reader_comes_as_one() -> None:
    async def main() -> None:
        async with connected(worker) as client:
            worker.single = True
            stream = client.submit(request("x", PROMPT, max_tokens=LONG))
            first = await anext(stream)
            worker.single = False
            worker.gate.set()
            await worker.idle()
            while client.load.running:  # the last frame has not come
                await asyncio.sleep(0.001)
            (rest,) = [output async for output in stream]
            assert [*first.token_ids, *rest.token_ids] == expected_greedy(PROMPT, LONG)

    with serving() as worker:
        run(main())


def test_refusals_reach_the_caller_by_kind() -> None:
    async def main() -> None:
        async with connected(worker) as client:
            for bad, error in (
                (request("a", []), InvalidRequest),
                (request("a", [99]), InvalidRequest),
                (request("a", [1], temperature="hot"), InvalidRequest),
                (request("a", [1], seed=1 << 80), InvalidRequest),
                (request("a", [1] * 60), NeverFits),
            ):
                with pytest.raises(error):
                    await tokens_of(client, bad)
            worker.gate.clear()
            first = asyncio.create_task(tokens_of(client, request("a", PROMPT)))
            await worker.has(1)
            with pytest.raises(QueueFull, match="1 requests are here already"):
                await tokens_of(client, request("b", PROMPT))
            worker.gate.set()
            assert await first == expected_greedy(PROMPT, 5)

    with serving(max_running=1, max_waiting=0) as worker:
        run(main())


@pytest.mark.parametrize("how", ["aclose", "cancel", "close the client", "cut the connection"])
def test_who_goes_away_frees_everything(how: str) -> None:
    async def main() -> None:
        async with connected(worker) as client, connected(worker) as other:
            worker.single = True
            stream = client.submit(request("x", PROMPT, max_tokens=LONG, ignore_eos=True))
            await anext(stream)
            task = asyncio.create_task(tokens_of(other, request("y", PROMPT)))
            await worker.has(2)
            if how == "aclose":
                await stream.aclose()
            elif how == "cancel":
                reading = asyncio.create_task(tokens_of(client, request("z", PROMPT)))
                await worker.has(3)
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
                assert reading.cancelled()
                await worker.has(2)
                await stream.aclose()
            elif how == "close the client":
                await client.close()
            else:
                client._writer.transport.abort()
            await worker.has(1)
            worker.single = False
            worker.gate.set()
            assert await task == expected_greedy(PROMPT, 5)
            await worker.idle()
            if how in ("close the client", "cut the connection"):
                with pytest.raises(PeerLost):
                    await anext(stream)
                with pytest.raises(PeerLost):
                    await tokens_of(client, request("z", PROMPT))
                assert not client.connected

    with serving() as worker:
        run(main())


def test_a_worker_that_closes_ends_streams_with_an_error() -> None:
    async def main() -> None:
        async with connected(worker) as client:
            worker.gate.clear()
            task = asyncio.create_task(tokens_of(client, request("x", PROMPT)))
            await worker.has(1)
            await asyncio.to_thread(worker.frontend.close)
            with pytest.raises(PeerLost, match="closed the connection"):
                await task
            assert worker.engine.load.running == 0
            with pytest.raises(OSError, match="Connect"):
                await WorkerClient.connect("127.0.0.1", worker.frontend.port, TOKEN)

    with serving() as worker:
        run(main())


def test_while_the_engine_stands_still_requests_are_taken_and_then_told_where_to_go() -> None:
    async def main() -> None:
        async with connected(worker) as client:
            worker.engine.stop()
            await asyncio.to_thread(worker.thread.join, 20)
            waiting = [client.submit(request(str(i), PROMPT, max_tokens=LONG)) for i in range(3)]
            ends = [asyncio.ensure_future(anext(stream)) for stream in waiting]
            await worker.has(3)
            ends.pop().cancel()
            await worker.has(2)
            worker.engine.retire()
            worker.frontend.emit(worker.engine.hand_over("cpu-1"))
            outputs = await asyncio.gather(*ends)
            late = [o async for o in client.submit(request("late", PROMPT))]
            assert [(o.id, o.token_ids, o.finish_reason, o.moved_to) for o in (*outputs, *late)] == [
                (name, (), "moved", "cpu-1") for name in ("0", "1", "late")
            ]
            assert client.connected

    with serving() as worker:
        run(main())


def test_what_comes_after_it_was_closed_goes_nowhere() -> None:
    with serving() as worker:
        for _ in range(2):
            worker.frontend.close()
        worker.frontend.emit([EngineOutput("x", (1,))])


def test_a_wrong_token_is_refused() -> None:
    async def main() -> None:
        with pytest.raises(OperatorError, match="refuses this deployment's token"):
            await WorkerClient.connect("127.0.0.1", worker.frontend.port, "another secret")

    with serving() as worker:
        run(main())


HELLO = frames.pack({"op": "hello", "version": frames.VERSION, "token": TOKEN})
SUBMIT = {"op": "submit", "request": request_to_wire(request("x", PROMPT))}


def body(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (frames.pack(SUBMIT), "expected a hello frame first"),
        (frames.pack({"op": "hello", "version": 0, "token": TOKEN}), "version: 0; expected 1"),
        (frames.pack({"op": "hello", "version": 1, "token": 5}), "wrong token"),
        ((5000).to_bytes(4, "little"), "frame of 5000 bytes; at most 4096"),
        (b"GET / HTTP/1.1\r\n\r\n", "at most 4096"),
        (HELLO + body(b"\xc1"), "is not msgpack"),
        (HELLO + body(b""), "is not msgpack"),
        (HELLO + body(b"\x92" * 2000), "is not msgpack"),
        (HELLO + body(msgpack.packb([1])), "expected a map"),
        (HELLO + body(msgpack.packb({"op": 1})), "expected a map"),
        (HELLO + (70000).to_bytes(4, "little"), "frame of 70000 bytes; at most 65536"),
        (HELLO + body(b"\x81")[:3], None),
        (HELLO + frames.pack({"op": "dance"}), "op: 'dance'"),
        (HELLO + frames.pack({"op": "abort", "id": 3}), "op: 'abort'"),
        (HELLO + frames.pack({"op": "submit"}), "missing, unknown or malformed"),
        (HELLO + frames.pack({"op": "submit", "request": {"id": "x", "prompt": [1]}}), "missing, unknown"),
        (HELLO + frames.pack({"op": "submit", "request": {**SUBMIT["request"], "id": 7}}), "id: 7"),  # type: ignore[dict-item]
        (
            HELLO + frames.pack({"op": "submit", "request": {**SUBMIT["request"], "sampling": {"x": 1}}}),  # type: ignore[dict-item]
            "malformed",
        ),
    ],
)
def test_malformed_frames_end_their_connection_and_harm_nobody(data: bytes, message: str | None) -> None:
    async def main() -> None:
        async with connected(worker) as client:
            worker.gate.clear()
            task = asyncio.create_task(tokens_of(client, request("y", PROMPT)))
            reader, writer = await asyncio.open_connection("127.0.0.1", worker.frontend.port)
            writer.write(data)
            if message is None:
                writer.write_eof()
            answers = []
            while (answer := await frames.read(reader)) is not None:
                answers.append(answer)
            assert answers[-1]["op"] == "error"
            assert (message or "the stream ended within a frame") in answers[-1]["message"]
            writer.close()
            worker.gate.set()
            assert await task == expected_greedy(PROMPT, 5)

    with serving(FrontendLimits(frame_bytes=65536)) as worker:
        run(main())


def test_a_duplicate_id_is_rejected_and_the_first_goes_on() -> None:
    async def main() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.frontend.port)
        worker.gate.clear()
        writer.write(HELLO + frames.pack(SUBMIT) * 2)
        kinds = []
        tokens: list[int] = []
        while len(tokens) < 5:
            answer = await frames.read(reader)
            assert answer is not None
            kinds.append(answer["op"])
            if answer["op"] == "rejected":
                assert (answer["id"], answer["kind"]) == ("x", "invalid")
                worker.gate.set()
            for output in answer.get("outputs", []):
                tokens += output["token_ids"]
        assert tokens == expected_greedy(PROMPT, 5)
        assert "rejected" in kinds
        writer.close()
        await writer.wait_closed()

    with serving() as worker:
        run(main())


def test_who_says_nothing_or_reads_nothing_is_hung_up_on() -> None:
    async def main() -> None:
        silent, writer = await asyncio.open_connection("127.0.0.1", worker.frontend.port)
        assert await silent.read() == b""
        writer.close()
        _, deaf = await asyncio.open_connection("127.0.0.1", worker.frontend.port)
        deaf.transport.pause_reading()  # type: ignore[attr-defined]
        deaf.write(HELLO)
        bad = frames.pack({"op": "submit", "request": {**SUBMIT["request"], "prompt": ["x" * 60000]}})  # type: ignore[dict-item]
        with suppress(OSError):
            while not deaf.transport.is_closing():  # each refusal quotes the token back
                deaf.write(bad)
                await deaf.drain()
        deaf.close()
        async with connected(worker) as client:
            assert await tokens_of(client, request("y", PROMPT)) == expected_greedy(PROMPT, 5)

    with serving(FrontendLimits(unread_bytes=200_000, hello_s=0.2)) as worker:
        run(main())


def test_a_machine_that_vanishes_is_noticed_within_half_a_minute() -> None:
    """Whether the kernel waits for something new from it, or for its word on what was sent."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        frames.keep_alive(sock)
        idle, every, count = (
            sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + every * count <= 30
        assert 0 < sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 30_000


def test_closing_does_not_wait_for_who_does_not_read() -> None:
    """A worker is released when its frontend is closed, and a hand-over, even a recovery, waits for that."""

    async def main() -> None:
        _, deaf = await asyncio.open_connection("127.0.0.1", worker.frontend.port)
        deaf.transport.pause_reading()  # type: ignore[attr-defined]
        deaf.write(HELLO)
        bad = frames.pack({"op": "submit", "request": {**SUBMIT["request"], "prompt": ["x" * 60000]}})  # type: ignore[dict-item]
        unsent = 0
        while not unsent:  # each refusal quotes the token back
            deaf.write(bad)
            await deaf.drain()
            writers = worker.frontend._conversations.values()
            unsent = sum(writer.transport.get_write_buffer_size() for writer in writers)
        await asyncio.wait_for(asyncio.to_thread(worker.frontend.close), 20)
        deaf.transport.abort()

    with serving() as worker:
        run(main())


def test_an_address_in_use_is_an_operators_error() -> None:
    with serving() as worker, pytest.raises(OperatorError, match="cannot listen at"):
        Frontend(worker.engine, "127.0.0.1", worker.frontend.port, TOKEN)


def test_wire_forms_come_back_unchanged() -> None:
    sampling = SamplingParams(stop_token_ids=(3, 4), seed=2**64 - 1, logprobs=2, min_p=0.5)
    r = EngineRequest("x", (1, 2), sampling, resumed=True, admitted=True)
    assert request_from_wire(frames.unpack(frames.pack({"op": "", "r": request_to_wire(r)})[4:])["r"]) == r
    logprobs = (TokenLogprob(-0.5, ((1, -0.5), (2, -3.0))), TokenLogprob(-1.0))
    for o in (
        EngineOutput("x", (1, 2), None, logprobs, 16),
        EngineOutput("x", (), "error", error="why"),
        EngineOutput("x", (), "moved", moved_to="a"),
    ):
        assert output_from_wire(frames.unpack(frames.pack({"op": "", "o": output_to_wire(o)})[4:])["o"]) == o
