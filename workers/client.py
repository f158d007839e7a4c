"""A connection to one worker's `frontend`. Free of torch, so that the ingress can import it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import replace

from ..errors import OperatorError, PeerLost
from . import frames
from .engine.errors import InvalidRequest, refusal
from .frames import FrameError, Message, Unauthorized
from .protocol import EngineLoad, EngineOutput, EngineRequest, output_from_wire, request_to_wire


class _Stream:
    """Outputs of one request on their way to whoever reads it; those that wait are handed out as one."""

    def __init__(self) -> None:
        self._outputs: deque[EngineOutput] = deque()
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, output: EngineOutput) -> None:
        self._outputs.append(output)
        self._changed.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._changed.set()

    async def take(self) -> EngineOutput:
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        waiting, self._outputs = self._outputs, deque()
        return waiting[0] if len(waiting) == 1 else _joined(waiting)


class WorkerClient:
    """Requests to one worker, many at a time. Use within one event loop; make it with `connect`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str, load: EngineLoad) -> None:
        self._writer, self._peer = writer, peer
        self._load = load
        self._streams: dict[str, _Stream] = {}
        self._ids = itertools.count()
        self._lost: PeerLost | None = None
        self._reading = asyncio.create_task(self._read(reader))

    @classmethod
    async def connect(cls, host: str, port: int, token: str, timeout_s: float = 10.0) -> WorkerClient:
        """Connect and say hello.

        Raises
        ------
        OSError
            Nobody answers there (`TimeoutError`: not in time).
        OperatorError
            The worker does not accept the token.
        PeerLost
            The worker hung up.
        """
        peer = f"worker at {host}:{port}"
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                frames.keep_alive(writer.get_extra_info("socket"))
                writer.write(frames.pack({"op": "hello", "version": frames.VERSION, "token": token}))
                return cls(reader, writer, peer, _welcome(await _answer(reader, peer), peer))
            except BaseException:
                writer.close()
                raise

    @property
    def load(self) -> EngineLoad:
        """The engine's last report."""
        return self._load

    @property
    def connected(self) -> bool:
        return self._lost is None

    async def submit(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Outputs up to the one with a finish reason; what arrives while the reader is busy comes as one.

        Closing the generator, or cancelling its reader, aborts the request. Nothing is sent before the first item is
        asked for.

        Raises
        ------
        RequestRefused
            The engine does not take it.
        PeerLost
            The connection ended.
        """
        wire_id, stream = str(next(self._ids)), _Stream()
        self._send_request(replace(request, id=wire_id))
        self._streams[wire_id] = stream
        try:
            while True:
                output = await stream.take()
                yield replace(output, id=request.id)
                if output.finish_reason is not None:
                    return
        finally:
            # Still listed only if neither the last output nor a refusal has come.
            if self._streams.pop(wire_id, None) is not None and self._lost is None:
                self._writer.write(frames.pack({"op": "abort", "id": wire_id}))

    async def close(self) -> None:
        """Hang up; whatever still runs on the connection raises `PeerLost`."""
        self._reading.cancel()
        await asyncio.wait([self._reading])
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _send_request(self, request: EngineRequest) -> None:
        if self._lost is not None:
            raise PeerLost(*self._lost.args)
        try:
            frame = frames.pack({"op": "submit", "request": request_to_wire(request)})
        except FrameError as e:
            raise InvalidRequest(str(e)) from e
        self._writer.write(frame)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._handle(await _answer(reader, self._peer))
        except (OSError, FrameError, PeerLost) as e:
            self._fail(e.reason if isinstance(e, PeerLost) else f"{self._peer}: {e}")
        except (KeyError, TypeError, ValueError) as e:
            self._fail(f"{self._peer} sent a malformed frame: {e!r}")
        finally:
            self._fail("closed on our side")

    def _handle(self, message: Message) -> None:
        if message["op"] == "outputs":
            self._load = EngineLoad(**message["load"])
            for data in message["outputs"]:
                self._put(output_from_wire(data))
        elif message["op"] == "rejected":
            stream = self._streams.pop(message["id"], None)
            if stream is not None:
                stream.fail(refusal(message["kind"], message["message"]))
        else:
            raise ValueError(f"op {message['op']!r}")

    def _put(self, output: EngineOutput) -> None:
        last = output.finish_reason is not None
        stream = self._streams.pop(output.id, None) if last else self._streams.get(output.id)
        if stream is not None:  # else it was aborted a moment ago
            stream.put(output)

    def _fail(self, reason: str) -> None:
        if self._lost is None:
            self._lost = PeerLost(-1, reason)
        self._writer.close()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(PeerLost(*self._lost.args))


async def _answer(reader: asyncio.StreamReader, peer: str) -> Message:
    message = await frames.read(reader, frames.ANY_LENGTH)
    if message is None:
        raise PeerLost(-1, f"{peer} closed the connection")
    if message["op"] == "error":
        if message.get("kind") == Unauthorized.kind:
            raise OperatorError(f"{peer} refuses this deployment's token: {message.get('message')}")
        raise PeerLost(-1, f"{peer} hung up: {message.get('message')}")
    return message


def _welcome(message: Message, peer: str) -> EngineLoad:
    if message["op"] != "welcome":
        raise PeerLost(-1, f"{peer} did not welcome us but sent {message['op']!r}")
    return EngineLoad(**message["load"])


def _joined(outputs: deque[EngineOutput]) -> EngineOutput:
    """Several outputs of one sequence, in order, as one."""
    return replace(
        outputs[-1],
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(logprob for output in outputs for logprob in output.logprobs),
        cached_tokens=max(output.cached_tokens for output in outputs),
    )
