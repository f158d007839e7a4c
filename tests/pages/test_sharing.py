from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from concertina.errors import InternalError, OperatorError
from concertina.workers.pages.backend import PoolGeometry
from concertina.workers.pages.memfd import MemfdBackend, MemfdPool
from concertina.workers.pages.sharing import PoolServer, fetch_pool

from .pools import no_thread

ADDRESS = f"@concertina-sharing-test-{os.getpid()}"


@pytest.fixture
def pool() -> Iterator[MemfdPool]:
    pool = MemfdBackend().create(PoolGeometry("shared", 8, 4096))
    yield pool
    pool.close()


@pytest.fixture
def server(pool: MemfdPool) -> Iterator[PoolServer]:
    server = PoolServer(pool, "secret", ADDRESS)
    yield server
    server.close()


def pools_open() -> int:
    """Descriptors of memfds in this process."""
    links = [Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.islink(link) and os.readlink(link).startswith("/memfd:shared") for link in links)


@contextmanager
def few_descriptors(count: int) -> Iterator[None]:
    """This process can open ``count`` more files, and no others."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    for fd in spare:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare[-1] + 1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def answer_once(address: str, reply: bytes, *descriptors: int) -> threading.Thread:
    """A server that speaks nonsense to its first client."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("\0" + address[1:])
    listener.listen()

    def run() -> None:
        client = listener.accept()[0]
        client.recv(4096)
        socket.send_fds(client, [reply], descriptors)
        client.shutdown(socket.SHUT_WR)
        client.recv(1)  # until the other side has hung up
        client.close()
        listener.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_fetched_pool_is_the_same_memory(pool: MemfdPool, server: PoolServer) -> None:
    fetched = fetch_pool(server.address, "secret")
    assert fetched.geometry == pool.geometry
    assert fetched.fd != pool.fd
    assert not os.get_inheritable(fetched.fd)
    os.pwrite(fetched.fd, b"hello", 4096)
    assert os.pread(pool.fd, 5, 4096) == b"hello"
    fetched.close()


def test_a_path_works_too_and_is_removed(pool: MemfdPool, tmp_path: Path) -> None:
    address = str(tmp_path / "pool.sock")
    server = PoolServer(pool, "secret", address)
    fetch_pool(address, "secret").close()
    with pytest.raises(OperatorError, match="cannot listen"):
        PoolServer(pool, "secret", address)
    server.close()
    assert not os.path.exists(address)


def test_a_path_left_by_a_killed_server_is_taken_over(pool: MemfdPool, tmp_path: Path) -> None:
    address = str(tmp_path / "pool.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(address)
    server = PoolServer(pool, "secret", address)
    fetch_pool(address, "secret").close()
    server.close()


@pytest.mark.parametrize("token", ["", "wrong", "secret ", "gehëim"])
def test_a_wrong_token_is_refused_and_leaks_nothing(server: PoolServer, token: str) -> None:
    before = pools_open()
    with pytest.raises(OperatorError, match=r"@concertina-sharing-test-\d+': token: refused"):
        fetch_pool(server.address, token)
    assert pools_open() == before


def test_silent_and_babbling_clients_do_not_disturb_others(server: PoolServer) -> None:
    silent, babbling = (socket.socket(socket.AF_UNIX) for _ in range(2))
    for client in (silent, babbling):
        client.connect("\0" + ADDRESS[1:])
    babbling.sendall(b"[1, 2]\n")
    assert babbling.recv(100) == b'{"error": "token"}\n'
    fetch_pool(server.address, "secret").close()
    silent.close()
    babbling.close()
    fetch_pool(server.address, "secret").close()


def test_a_dead_address_is_named() -> None:
    with pytest.raises(InternalError, match="'@concertina-nobody': no answer"):
        fetch_pool("@concertina-nobody", "secret")
    with pytest.raises(InternalError, match=r"'/nowhere/pool.sock': no answer"):
        fetch_pool("/nowhere/pool.sock", "secret")


@pytest.mark.parametrize("reply", [b"", b"{}\n", b"nonsense\n", b'{"name": "x", "pages": "y", "page_bytes": 4096}\n'])
def test_a_malformed_answer_is_an_error(reply: bytes) -> None:
    thread = answer_once(ADDRESS + "-nonsense", reply)
    with pytest.raises(InternalError, match="malformed answer"):
        fetch_pool(ADDRESS + "-nonsense", "secret")
    thread.join()


def test_an_answer_without_a_descriptor_is_an_error() -> None:
    thread = answer_once(ADDRESS + "-empty", b'{"name": "x", "pages": 1, "page_bytes": 4096}\n')
    with pytest.raises(OperatorError, match="expected 1 descriptor for a memfd pool, got 0"):
        fetch_pool(ADDRESS + "-empty", "secret")
    thread.join()


@pytest.mark.parametrize("arriving", [0, 20])
def test_a_descriptor_dropped_for_want_of_numbers_is_said_and_may_be_tried_again(
    pool: MemfdPool, server: PoolServer, arriving: int
) -> None:
    address, before = f"{ADDRESS}-dropped-{arriving}", pools_open()
    thread = answer_once(address, b'{"name": "shared", "pages": 8, "page_bytes": 4096}\n', *[pool.fd] * 60)
    with (
        few_descriptors(2 + arriving),  # both ends of the connection
        pytest.raises(InternalError, match=r"-dropped-.*this process is out of file descriptors \(limit \d+\)"),
    ):
        fetch_pool(address, "secret")
    thread.join()
    assert pools_open() == before
    fetch_pool(server.address, "secret").close()


def test_a_server_that_gets_no_thread_serves_the_next_client(
    server: PoolServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(InternalError, match=r"no answer|malformed answer"):
            fetch_pool(server.address, "secret", timeout_s=2)
    fetch_pool(server.address, "secret", timeout_s=2).close()
    assert "cannot accept: can't start new thread" in caplog.text


def test_a_server_that_never_answers_times_out() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + ADDRESS[1:] + "-hung")
        listener.listen()
        with pytest.raises(InternalError, match="no answer"):
            fetch_pool(ADDRESS + "-hung", "secret", timeout_s=0.05)


def test_a_server_needs_a_token_and_a_free_address(pool: MemfdPool, server: PoolServer) -> None:
    with pytest.raises(OperatorError, match="token: expected a non-empty secret"):
        PoolServer(pool, "", ADDRESS + "-other")
    with pytest.raises(OperatorError, match="cannot listen"):
        PoolServer(pool, "secret", ADDRESS)
