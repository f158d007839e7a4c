"""Handing a pool's descriptors to other processes over a Unix socket (``SCM_RIGHTS``).

Works across PID namespaces, where ``/proc/PID/fd`` does not. An address is a path, or ``@name`` for the
abstract namespace, which leaves no file behind. One exchange per connection: a JSON line with the token, then
a JSON line with the pool's geometry, and its descriptors beside it.
"""

from __future__ import annotations

import array
import errno
import hmac
import json
import logging
import os
import resource
import socket
import stat
import threading
from typing import Any

from ...errors import InternalError, OperatorError
from .backend import PoolGeometry
from .memfd import MemfdBackend, MemfdPool

_log = logging.getLogger(__name__)
_LINE_BYTES = 4096
_HELLO_TIMEOUT_S = 5.0
_RETRY_S = 0.1  # after a client could not be accepted, for instance for want of descriptors or threads
_ANCILLARY_BYTES = socket.CMSG_SPACE(64 * array.array("i").itemsize)


class PoolServer:
    """Serves a pool to whoever knows the token, from a thread; owners run one, and workers may, for re-adoption.

    Parameters
    ----------
    pool : MemfdPool
        Must stay open until `close`.
    token : str
        Shared secret, not empty.
    address : str
        A path or ``@name``.

    Raises
    ------
    OperatorError
        The token is empty, or the address cannot be bound.
    """

    def __init__(self, pool: MemfdPool, token: str, address: str) -> None:
        if not token:
            raise OperatorError("pool server: token: expected a non-empty secret")
        self.pool = pool
        self._token = token
        self.address = address
        self._closing = threading.Event()
        self._listener = _listen(address)
        self._thread = threading.Thread(target=self._accept_all, name=f"pool-server {address}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving; descriptors that were handed out stay valid."""
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # ends a waiting accept()
        self._thread.join()
        self._listener.close()
        if not self.address.startswith("@") and os.path.exists(self.address):
            os.unlink(self.address)

    def _accept_all(self) -> None:
        while not self._closing.is_set():
            try:
                self._accept()
            except (OSError, RuntimeError) as e:
                if not self._closing.wait(_RETRY_S):
                    _log.warning("pool server %s: cannot accept: %s", self.address, e)

    def _accept(self) -> None:
        """Serve the next client from a thread of its own; RuntimeError where the system has none to give."""
        connection = self._listener.accept()[0]
        try:
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        except RuntimeError:
            connection.close()
            raise

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(_HELLO_TIMEOUT_S)
            try:
                self._answer(connection)
            except (OSError, InternalError) as e:  # the client went away or is silent, or the pool was closed
                _log.warning("pool server %s: a client was not served: %s", self.address, e)

    def _answer(self, connection: socket.socket) -> None:
        line, unasked = _read_line(connection)
        _close_all(unasked)
        hello = _parse(line)
        if not hmac.compare_digest(str(hello.get("token", "")).encode(), self._token.encode()):
            connection.sendall(b'{"error": "token"}\n')
            return
        geometry, descriptors = self.pool.geometry, self.pool.export()
        reply = {"name": geometry.name, "pages": geometry.pages, "page_bytes": geometry.page_bytes}
        socket.send_fds(connection, [json.dumps(reply).encode() + b"\n"], list(descriptors))


def fetch_pool(address: str, token: str, timeout_s: float = 10.0) -> MemfdPool:
    """Import the pool that is served at ``address``.

    Raises
    ------
    OperatorError
        The token is refused.
    InternalError
        Nobody listens there, the answer does not come within ``timeout_s`` or is no answer, or this process is out
        of file descriptors.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(_kernel_address(address))
            connection.sendall(json.dumps({"token": token}).encode() + b"\n")
            line, descriptors = _read_line(connection)
    except OSError as e:
        raise InternalError(f"page pool at {address!r}: no answer: {e}") from e
    return _import(address, line, descriptors)


def _import(address: str, line: bytes, descriptors: list[int]) -> MemfdPool:
    try:
        reply = _parse(line)
        if reply.get("error") == "token":
            raise OperatorError(f"page pool at {address!r}: token: refused by its server")
        try:
            geometry = PoolGeometry(reply["name"], reply["pages"], reply["page_bytes"])
        except (KeyError, TypeError) as e:
            raise InternalError(f"page pool at {address!r}: malformed answer {line[:80]!r}") from e
        return MemfdBackend().import_pool(descriptors, geometry)
    except BaseException:
        _close_all(descriptors)
        raise


def _read_line(connection: socket.socket) -> tuple[bytes, list[int]]:
    line, descriptors = b"", list[int]()
    try:
        while not line.endswith(b"\n") and len(line) < _LINE_BYTES:
            data, messages, flags, _ = connection.recvmsg(_LINE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
            descriptors += _descriptors(messages)
            if flags & socket.MSG_CTRUNC:  # the kernel dropped what it found no number for
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                raise OSError(errno.EMFILE, f"this process is out of file descriptors (limit {limit})")
            if not data:
                break
            line += data
    except OSError:
        _close_all(descriptors)
        raise
    return line, descriptors


def _descriptors(messages: list[tuple[int, int, bytes]]) -> list[int]:
    """Descriptors in ancillary data; `socket.recv_fds` cannot make them close on exec (it drops its flags)."""
    found = array.array("i")
    for level, kind, data in messages:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _close_all(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _kernel_address(address: str) -> str:
    return "\0" + address[1:] if address.startswith("@") else address


def _listen(address: str) -> socket.socket:
    _remove_dead_socket(address)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(_kernel_address(address))
        listener.listen(64)
    except OSError as e:
        listener.close()
        raise OperatorError(f"pool server: address {address!r}: cannot listen: {e}") from e
    return listener


def _remove_dead_socket(address: str) -> None:
    """Unlink a path that a killed server left; one that answers, or no socket, stays and makes bind fail."""
    if address.startswith("@") or not os.path.exists(address) or not stat.S_ISSOCK(os.stat(address).st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            os.unlink(address)
