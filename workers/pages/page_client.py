"""Reading pages over TCP, and the few frames that `page_server` understands.

The client says a JSON line (version, token) and gets one (the pool's geometry). Then, as often as it likes, a request:
the number of runs (u32) and for each its first page and count (u64 each), all little-endian. The answer is the length
of a complaint (u32); if that is 0 the pages' bytes follow, else the complaint, and the server hangs up.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...errors import InternalError, OperatorError
from .backend import PoolGeometry, runs
from .scatter import check_request

VERSION = 1
LINE_BYTES = 4096
REQUEST_BYTES = 16 << 20  # of pages in one request, unless a single page has more
REQUEST_RUNS = 1024
REQUEST_TIMEOUT_S = 30.0  # for all of a request; slower than half a megabyte a second counts as dead
COUNT = struct.Struct("<I")
RUN = struct.Struct("<QQ")


class RemotePages:
    """A pool of another host, read from its owner's page server.

    Parameters
    ----------
    host, port : str, int
    token : str
    timeout_s : float
        For connecting and being let in.
    request_timeout_s : float
        For all of a request.

    Raises
    ------
    OperatorError
        The token is refused.
    InternalError
        Nobody answers, or what answers is no page server of this version.
    """

    def __init__(
        self,
        host: str,
        port: int,
        token: str,
        timeout_s: float = 10.0,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self._request_timeout_s = request_timeout_s
        self._where = f"page server {host}:{port}"
        try:
            self._socket = socket.create_connection((host, port), timeout_s)
        except OSError as e:
            raise InternalError(f"{self._where}: no answer: {e}") from e
        try:
            self.geometry = self._enter(token, timeout_s)
        except BaseException:
            self._socket.close()
            raise

    def _enter(self, token: str, timeout_s: float) -> PoolGeometry:
        try:
            self._socket.sendall(json.dumps({"version": VERSION, "token": token}).encode() + b"\n")
            reply = parse_line(receive_line(self._socket, time.monotonic() + timeout_s))
        except OSError as e:
            raise InternalError(f"{self._where}: no answer: {e}") from e
        if reply.get("error") == "token":
            raise OperatorError(f"{self._where}: token: refused")
        try:
            return PoolGeometry(str(reply["name"]), int(reply["pages"]), int(reply["page_bytes"]))
        except (KeyError, TypeError, ValueError, OperatorError) as e:
            raise InternalError(f"{self._where}: malformed answer {str(reply)[:80]}") from e

    def read_into(
        self, pages: Sequence[int], segments: Sequence[memoryview], copied: Callable[[int], None] | None = None
    ) -> None:
        """See `transfer.PageReader.read_into`."""
        check_request(self.geometry, pages, segments)
        memory = _Memory(segments)
        for request, nbytes in _requests(self.geometry, pages):
            deadline_s = time.monotonic() + self._request_timeout_s
            try:
                self._ask(request, deadline_s)
                for part in memory.take(nbytes):
                    receive(self._socket, part, deadline_s)
            except OSError as e:
                self.close()  # what may still arrive belongs to no request
                raise InternalError(f"{self._where}: pool {self.geometry.name!r}: lost while reading: {e}") from e
            if copied:
                copied(nbytes)

    def _ask(self, request: Sequence[tuple[int, int]], deadline_s: float) -> None:
        self._socket.settimeout(self._request_timeout_s)
        self._socket.sendall(COUNT.pack(len(request)) + b"".join(RUN.pack(*run) for run in request))
        length = COUNT.unpack(receive(self._socket, memoryview(bytearray(COUNT.size)), deadline_s))[0]
        if length:
            complaint = receive(self._socket, memoryview(bytearray(min(length, LINE_BYTES))), deadline_s)
            self.close()
            raise InternalError(f"{self._where}: refused: {bytes(complaint).decode(errors='replace')}")

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> RemotePages:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Memory:
    """Segments to be filled one after the other."""

    def __init__(self, segments: Sequence[memoryview]) -> None:
        self._left = [segment.cast("B") for segment in reversed(segments)]

    def take(self, nbytes: int) -> Iterator[memoryview]:
        while nbytes:
            segment = self._left.pop()
            part, rest = segment[:nbytes], segment[nbytes:]
            if rest:
                self._left.append(rest)
            nbytes -= len(part)
            if part:
                yield part


def _requests(geometry: PoolGeometry, pages: Sequence[int]) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Runs of pages that fit one request each, and their bytes."""
    most = max(1, REQUEST_BYTES // geometry.page_bytes)
    request, room = list[tuple[int, int]](), most
    for first, count in runs(pages):
        while count:
            part = min(count, room)
            request.append((first, part))
            first, count, room = first + part, count - part, room - part
            if not room or len(request) == REQUEST_RUNS:
                yield request, (most - room) * geometry.page_bytes
                request, room = [], most
    if request:
        yield request, (most - room) * geometry.page_bytes


def receive(connection: socket.socket, memory: memoryview, deadline_s: float) -> memoryview:
    """Fill ``memory``; raises OSError when the stream ends or the deadline passes, however much trickles in."""
    left = memory
    while left:
        connection.settimeout(_remaining_s(deadline_s))
        count = connection.recv_into(left)
        if not count:
            raise ConnectionError(f"the stream ended {len(left)} bytes early")
        left = left[count:]
    return memory


def receive_line(connection: socket.socket, deadline_s: float) -> bytes:
    """A line of at most `LINE_BYTES`, without what may follow it; raises OSError like `receive`."""
    line = b""
    while not line.endswith(b"\n") and len(line) < LINE_BYTES:
        connection.settimeout(_remaining_s(deadline_s))
        ahead = connection.recv(LINE_BYTES - len(line), socket.MSG_PEEK)
        if not ahead:
            raise ConnectionError("the stream ended within a line")
        line += connection.recv(ahead.find(b"\n") + 1 or len(ahead))
    return line


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; empty where it is none."""
    try:
        parsed = json.loads(line)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _remaining_s(deadline_s: float) -> float:
    left = deadline_s - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left
