"""The engine's door: a TCP server, in a thread of its own, that speaks the frames of `frames`.

One connection carries many requests. When it closes, for whatever reason, its sequences are aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

from ..errors import ConcertinaError, OperatorError
from . import frames
from .engine.errors import InvalidRequest, RequestRefused
from .frames import FrameError, Message
from .protocol import EngineLoad, EngineOutput, EngineRequest, output_to_wire, request_from_wire

_log = logging.getLogger(__name__)
_HELLO_BYTES = 4096  # a stranger may not make us read more
_HANG_UP_S = 1.0  # for what was written to leave


class EngineDoor(Protocol):
    """What the frontend needs of an engine; all of it from any thread."""

    @property
    def load(self) -> EngineLoad: ...

    def submit(self, request: EngineRequest) -> None: ...

    def abort(self, request_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class FrontendLimits:
    """Longest frame; bytes that may wait for a client that does not read; seconds to say hello."""

    frame_bytes: int = frames.MAX_FRAME_BYTES
    unread_bytes: int = 64 << 20
    hello_s: float = 10.0


@dataclass(slots=True, eq=False)
class _Connection:
    writer: asyncio.StreamWriter
    sequences: dict[str, str] = field(default_factory=dict)  # the client's id -> the engine's
    load: EngineLoad | None = None  # as last told


class Frontend:
    """Serves from construction until `close`.

    Parameters
    ----------
    engine : EngineDoor
    host, port
        Where to listen; port 0 takes a free one, see `port`.
    token : str
        What clients must know.
    limits : FrontendLimits

    Raises
    ------
    OperatorError
        The address cannot be listened at.
    """

    def __init__(
        self, engine: EngineDoor, host: str, port: int, token: str, limits: FrontendLimits | None = None
    ) -> None:
        try:
            sock = socket.create_server((host, port))
        except OSError as e:
            raise OperatorError(f"worker frontend: cannot listen at {host}:{port}: {e}") from e
        self.port: int = sock.getsockname()[1]
        self._engine, self._token, self._limits = engine, token, limits or FrontendLimits()
        self._connections: set[_Connection] = set()
        self._owners: dict[str, tuple[_Connection, str]] = {}  # the engine's id -> who asked, under which id
        self._conversations: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._count = 0
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._open = True
        self._gate = threading.Lock()  # so that nothing is handed to a loop that is closed
        self._thread = threading.Thread(target=self._run, args=(sock,), name="frontend", daemon=True)
        self._thread.start()

    def emit(self, outputs: list[EngineOutput]) -> None:
        """Send one step's outputs to whom they belong. From the engine's thread; never waits for a client."""
        with self._gate:
            if self._open:
                self._loop.call_soon_threadsafe(self._deliver, outputs, self._engine.load)

    def close(self) -> None:
        """Hang up on everyone, which aborts their sequences, and end the thread."""
        with self._gate:
            if self._open:
                self._open = False
                self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def _run(self, sock: socket.socket) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._main(sock))
        del self._engine  # which has our `emit`, and much memory

    async def _main(self, sock: socket.socket) -> None:
        server = await asyncio.start_server(self._client, sock=sock)
        await self._ended.wait()
        server.close()
        conversations = dict(self._conversations)
        for writer in conversations.values():
            writer.close()  # its reader sees the end of the stream, once all that was written has left
        if conversations:
            _, unread = await asyncio.wait(conversations, timeout=_HANG_UP_S)
            for task in unread:
                conversations[task].transport.abort()
        await asyncio.gather(*conversations, return_exceptions=True)  # asyncio has logged them

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._conversations[task] = writer
        connection = _Connection(writer)
        try:
            await self._converse(connection, reader)
        except FrameError as e:
            self._send(connection, {"op": "error", "kind": e.kind, "message": str(e)})
        except OSError as e:  # time-outs too
            _log.info("a client's connection broke: %r", e)
        except ConcertinaError as e:
            _log.exception("a client's connection failed")
            self._send(connection, {"op": "error", "kind": "internal", "message": str(e)})
        finally:
            self._drop(connection)
            await _hang_up(writer)
            del self._conversations[task]

    async def _converse(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        frames.keep_alive(connection.writer.get_extra_info("socket"))
        async with asyncio.timeout(self._limits.hello_s):
            hello = await frames.read(reader, _HELLO_BYTES)
        frames.check_hello(hello, self._token)
        connection.load = self._engine.load
        self._connections.add(connection)
        self._send(connection, {"op": "welcome", "load": asdict(connection.load)})
        while (message := await frames.read(reader, self._limits.frame_bytes)) is not None:
            self._handle(connection, message)

    def _handle(self, connection: _Connection, message: Message) -> None:
        if message["op"] == "submit":
            self._submit(connection, _parse(message))
        elif message["op"] == "abort" and isinstance(message.get("id"), str):
            self._abort(connection, message["id"])
        else:
            raise FrameError(f"op: {message['op']!r}; expected 'submit' with a request, or 'abort' with an id")

    def _submit(self, connection: _Connection, request: EngineRequest) -> None:
        # The engine's ids are never used twice, so that late outputs of an aborted request find no owner.
        self._count += 1
        engine_id = f"{self._count}"
        try:
            if request.id in connection.sequences:
                raise InvalidRequest(f"id: {request.id!r} belongs to a request that has not ended")
            self._engine.submit(replace(request, id=engine_id))
        except RequestRefused as e:
            self._send(connection, {"op": "rejected", "id": request.id, "kind": e.kind, "message": str(e)})
            return
        # Outputs come through this thread's loop, hence after these two lines.
        connection.sequences[request.id] = engine_id
        self._owners[engine_id] = (connection, request.id)

    def _abort(self, connection: _Connection, client_id: str) -> None:
        engine_id = connection.sequences.pop(client_id, None)
        if engine_id is not None:
            del self._owners[engine_id]
            self._engine.abort(engine_id)

    def _drop(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        for client_id in list(connection.sequences):
            self._abort(connection, client_id)

    def _deliver(self, outputs: Sequence[EngineOutput], load: EngineLoad) -> None:
        mine: dict[_Connection, list[Message]] = {}
        for output in outputs:
            connection, client_id = self._owners.get(output.id, (None, ""))
            if connection is None:
                continue
            mine.setdefault(connection, []).append(output_to_wire(output) | {"id": client_id})
            if output.finish_reason is not None:
                del self._owners[output.id], connection.sequences[client_id]
        for connection in self._connections:
            if connection in mine or connection.load != load:
                connection.load = load
                message = {"op": "outputs", "outputs": mine.get(connection, []), "load": asdict(load)}
                self._send(connection, message)

    def _send(self, connection: _Connection, message: Message) -> None:
        transport = connection.writer.transport
        if transport.is_closing():
            return
        connection.writer.write(frames.pack(message, frames.ANY_LENGTH))
        if transport.get_write_buffer_size() > self._limits.unread_bytes:
            _log.warning("a client does not read: %d bytes wait; hanging up", transport.get_write_buffer_size())
            transport.abort()


def _parse(message: Message) -> EngineRequest:
    try:
        request = request_from_wire(message["request"])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise FrameError(f"submit: the request has missing, unknown or malformed fields: {e!r}") from e
    if not isinstance(request.id, str):
        raise FrameError(f"submit: id: {request.id!r}; expected a string")
    return request


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    """Close, giving what was written a while to leave."""
    writer.close()
    try:
        with contextlib.suppress(OSError):
            await asyncio.wait_for(writer.wait_closed(), _HANG_UP_S)
    finally:
        writer.transport.abort()
