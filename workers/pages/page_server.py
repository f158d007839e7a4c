"""Serving a pool's pages over TCP, to owners and workers of other hosts; `page_client` has the frames.

A stranger learns nothing: not even the geometry is said before the token was checked. Whatever a client does, it costs
one thread for a bounded time.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import socket
import threading
import time

from ...errors import InternalError, OperatorError
from .backend import runs
from .holds import Holds
from .memfd import MemfdPool
from .page_client import (
    COUNT,
    LINE_BYTES,
    REQUEST_BYTES,
    REQUEST_RUNS,
    REQUEST_TIMEOUT_S,
    RUN,
    VERSION,
    parse_line,
    receive,
    receive_line,
)

_log = logging.getLogger(__name__)
_HELLO_TIMEOUT_S = 5.0
_IDLE_TIMEOUT_S = 60.0
_CLIENTS = 64
_RETRY_S = 0.1  # after a client could not be accepted, for instance for want of descriptors or threads
_SEND_BYTES = 1 << 20  # read and sent at a time


class PageServer:
    """Serves pages to whoever knows the token, from threads.

    Parameters
    ----------
    pool : MemfdPool
        Must stay open until `close`.
    token : str
        Shared secret, not empty.
    host : str
        Address to listen on.

    Raises
    ------
    OperatorError
        The token is empty, or the address cannot be bound.
    """

    def __init__(self, pool: MemfdPool, token: str, host: str) -> None:
        if not token:
            raise OperatorError("page server: token: expected a non-empty secret")
        self._pool = pool
        self._token = token
        self._clients: set[socket.socket] = set()
        self._closing = threading.Event()
        self._listener = _listen(host)
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept_all, name=f"page-server {self.port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and hang up on everybody."""
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # ends a waiting accept()
        self._thread.join()
        self._listener.close()
        for client in tuple(self._clients):
            _hang_up(client)

    def _accept_all(self) -> None:
        while not self._closing.is_set():
            try:
                self._accept()
            except (OSError, RuntimeError) as e:
                if not self._closing.wait(_RETRY_S):
                    _log.warning("page server: port %d: cannot accept: %s", self.port, e)

    def _accept(self) -> None:
        """Serve the next client from a thread of its own; RuntimeError where the system has none to give."""
        client = self._listener.accept()[0]
        if len(self._clients) >= _CLIENTS:
            client.close()
            return
        self._clients.add(client)
        try:
            threading.Thread(target=self._serve, args=(client,), name=f"pages {self.port}", daemon=True).start()
        except RuntimeError:
            self._clients.discard(client)
            client.close()
            raise

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, self._pool.holds() as holds:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._let_in(client):
                    while not self._closing.is_set() and self._answer(client, holds):
                        pass
        except (OSError, InternalError) as e:  # it went away, is silent or too slow, or the pool was closed
            _log.warning("page server: port %d: a client was not served: %s", self.port, e)
        finally:
            self._clients.discard(client)

    def _let_in(self, client: socket.socket) -> bool:
        hello = parse_line(receive_line(client, time.monotonic() + _HELLO_TIMEOUT_S))
        client.settimeout(_HELLO_TIMEOUT_S)
        known = hmac.compare_digest(str(hello.get("token", "")).encode(), self._token.encode())
        if not known or hello.get("version") != VERSION:
            client.sendall(b'{"error": "version"}\n' if known else b'{"error": "token"}\n')
            return False
        geometry = self._pool.geometry
        reply = {"name": geometry.name, "pages": geometry.pages, "page_bytes": geometry.page_bytes}
        client.sendall(json.dumps(reply).encode() + b"\n")
        return True

    def _answer(self, client: socket.socket, holds: Holds) -> bool:
        """Serve one request; False when the client has hung up, or was sent away."""
        client.settimeout(_IDLE_TIMEOUT_S)
        if not client.recv(1, socket.MSG_PEEK):
            return False
        deadline_s = time.monotonic() + _HELLO_TIMEOUT_S
        try:
            request = self._receive_request(client, deadline_s)
            pages = [page for first, count in request for page in range(first, first + count)]
            holds.share(pages)
        except InternalError as e:
            text = str(e).encode()[:LINE_BYTES]
            client.sendall(COUNT.pack(len(text)) + text)
            return False
        try:
            self._send(client, runs(pages))
        finally:
            holds.release(pages)
        return True

    def _receive_request(self, client: socket.socket, deadline_s: float) -> list[tuple[int, int]]:
        length = COUNT.unpack(receive(client, memoryview(bytearray(COUNT.size)), deadline_s))[0]
        if not 0 < length <= REQUEST_RUNS:
            raise InternalError(f"expected 1 to {REQUEST_RUNS} runs of pages in a request, got {length}")
        body = receive(client, memoryview(bytearray(length * RUN.size)), deadline_s)
        request = list(RUN.iter_unpack(body))
        geometry = self._pool.geometry
        if not all(count and first + count <= geometry.pages for first, count in request):
            raise InternalError(f"pool {geometry.name!r}: pages outside 0..{geometry.pages - 1}, or none")
        wanted = sum(count for _, count in request)
        if wanted > max(1, REQUEST_BYTES // geometry.page_bytes):
            raise InternalError(f"{wanted} pages in one request are more than {REQUEST_BYTES} bytes")
        return request

    def _send(self, client: socket.socket, request: list[tuple[int, int]]) -> None:
        size = self._pool.geometry.page_bytes
        deadline_s = time.monotonic() + REQUEST_TIMEOUT_S
        client.settimeout(REQUEST_TIMEOUT_S)
        client.sendall(COUNT.pack(0))
        for first, count in request:
            offset, end = first * size, (first + count) * size
            while offset < end:
                # Not from a mapping: reading a page that is not there would make it, for good.
                data = os.pread(self._pool.fd, min(_SEND_BYTES, end - offset), offset)
                client.settimeout(max(0.001, deadline_s - time.monotonic()))  # sendall counts it for all of its bytes
                client.sendall(data)
                offset += len(data)


def _listen(host: str) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, 0), family=family, backlog=64)
    except OSError as e:
        raise OperatorError(f"page server: host {host!r}: cannot listen: {e}") from e


def _hang_up(client: socket.socket) -> None:
    try:
        client.shutdown(socket.SHUT_RDWR)
    except OSError as e:  # it was faster
        _log.debug("page server: hanging up: %s", e)
