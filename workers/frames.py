"""Frames on a worker's socket: a 4-byte little-endian length, then a msgpack map whose ``op`` says what it is.

From the client: ``hello`` (version, token) first, then ``submit`` (request) and ``abort`` (id). From the worker:
``welcome`` (load), ``outputs`` (outputs, load) once per engine step, ``rejected`` (id, kind, message), and ``error``
(kind, message) before it hangs up.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from typing import Any, ClassVar

import msgpack

from ..errors import CallerError

VERSION = 1
MAX_FRAME_BYTES = 16 << 20  # of what a client may send
ANY_LENGTH = (1 << 32) - 1
Message = dict[str, Any]


class FrameError(CallerError):
    """The bytes are no frame, or not one that is allowed here."""

    kind: ClassVar[str] = "protocol"


class Unauthorized(FrameError):
    """The client does not know the deployment's token."""

    kind: ClassVar[str] = "unauthorized"


def pack(message: Message, limit: int = MAX_FRAME_BYTES) -> bytes:
    """A frame.

    Raises
    ------
    FrameError
        A value cannot be sent (an integer beyond 64 bits, an unknown type), or the frame exceeds ``limit`` bytes.
    """
    try:
        body: bytes = msgpack.packb(message)  # type: ignore[no-untyped-call]
    except (OverflowError, TypeError, ValueError) as e:
        raise FrameError(f"frame {message.get('op')!r} cannot be packed: {e}") from e
    if len(body) > limit:
        raise FrameError(f"frame {message.get('op')!r} has {len(body)} bytes; at most {limit} are allowed")
    return len(body).to_bytes(4, "little") + body


def unpack(body: bytes) -> Message:
    """The map in a frame's body.

    Raises
    ------
    FrameError
        It is no msgpack map with a string under ``op``.
    """
    try:
        message = msgpack.unpackb(body)  # type: ignore[no-untyped-call, attr-defined]
    except (ValueError, msgpack.UnpackException) as e:
        raise FrameError(f"frame of {len(body)} bytes is not msgpack: {e!r}") from e
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise FrameError(f"frame of {len(body)} bytes: expected a map with a string under 'op'")
    return message


async def read(reader: asyncio.StreamReader, limit: int = MAX_FRAME_BYTES) -> Message | None:
    """The next frame's map; None where the stream ends between two frames.

    Raises
    ------
    FrameError
        The frame is too long, is cut off, or is no map.
    """
    try:
        length = int.from_bytes(await reader.readexactly(4), "little")
        if length > limit:
            raise FrameError(f"frame of {length} bytes; at most {limit} are allowed")
        return unpack(await reader.readexactly(length))
    except asyncio.IncompleteReadError as e:
        if e.expected == 4 and not e.partial:
            return None
        raise FrameError(f"the stream ended within a frame: {len(e.partial)} of {e.expected} bytes") from e


def check_hello(message: Message | None, token: str) -> None:
    """Refuse a client that does not know the deployment's token.

    Raises
    ------
    Unauthorized
        The token is wrong or missing.
    FrameError
        It is no hello, or one of another version.
    """
    if message is None or message["op"] != "hello":
        raise FrameError("expected a hello frame first")
    given = message.get("token")
    if not isinstance(given, str) or not hmac.compare_digest(given.encode(), token.encode()):
        raise Unauthorized("wrong token")
    if message.get("version") != VERSION:
        raise FrameError(f"version: {message.get('version')!r}; expected {VERSION}")


def keep_alive(sock: socket.socket) -> None:
    """Let the kernel notice within half a minute that the other machine is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # The last in milliseconds: while something is on its way, the kernel asks nothing and sends it again for minutes.
    options = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000))
    for option, value in options:
        if hasattr(socket, option):  # named differently or absent outside Linux
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
