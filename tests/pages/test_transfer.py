"""P11: pages arrive bit for bit, from near and far, and nobody without the token learns anything."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise

import pytest
from concertina.errors import InternalError, OperatorError
from concertina.workers.owner import MemoryOwner
from concertina.workers.pages import page_client, page_server
from concertina.workers.pages.backend import PoolGeometry
from concertina.workers.pages.holds import PagesHeld
from concertina.workers.pages.memfd import MemfdBackend
from concertina.workers.pages.page_client import COUNT, RUN
from concertina.workers.pages.sharing import fetch_pool
from concertina.workers.pages.transfer import LocalPages, PageSource, open_pages, read_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .pools import PAGE, config, no_thread, write

POOL = 128


@pytest.fixture(scope="module")
def owner() -> Iterator[MemoryOwner]:
    owner = MemoryOwner(config(POOL))
    write(owner, owner.allocate("trunk", "trunk", owner.usage()["free"]).pages)
    yield owner
    owner.close()


@pytest.fixture(params=["near", "far"])
def source(owner: MemoryOwner, request: pytest.FixtureRequest) -> PageSource:
    whole = owner.source()
    return replace(whole, port=0) if request.param == "near" else replace(whole, address="")


def far(owner: MemoryOwner) -> PageSource:
    return replace(owner.source(), address="")


def connect(owner: MemoryOwner) -> socket.socket:
    return socket.create_connection((owner.source().host, owner.source().port), 10)


def let_in(owner: MemoryOwner) -> socket.socket:
    client = connect(owner)
    client.sendall(b'{"version": 1, "token": "secret"}\n')
    assert json.loads(client.recv(4096))["pages"] == POOL
    return client


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pages_arrive_in_any_order_and_cut(owner: MemoryOwner, source: PageSource, data: st.DataObject) -> None:
    pages = data.draw(st.lists(st.integers(3, POOL - 1), max_size=40))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(pages) * PAGE), max_size=6)))
    memory = bytearray(len(pages) * PAGE)
    ends = [0, *cuts, len(memory)]
    segments = [memoryview(memory)[a:b] for a, b in pairwise(ends)]
    arrived: list[int] = []
    with open_pages(source) as reader:
        reader.read_into(pages, segments, arrived.append)
        assert reader.geometry == owner.pool.geometry
    with owner.pool.holds() as holds:
        wait_until(lambda: holds.claim(range(POOL)))  # nothing stays held for long
    assert sum(arrived) == len(memory)
    expected = owner._window.memory()
    assert all(memory[n * PAGE : (n + 1) * PAGE] == expected[p * PAGE : (p + 1) * PAGE] for n, p in enumerate(pages))


def test_more_than_one_request_holds_is_cut(owner: MemoryOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_client, "REQUEST_BYTES", 3 * PAGE)
    monkeypatch.setattr(page_client, "REQUEST_RUNS", 2)
    pages = [29, 30, 31, 32, 33, 40, 42, 44, 46, 27]
    memory = bytearray(len(pages) * PAGE)
    with open_pages(far(owner)) as reader:
        reader.read_into(pages, [memoryview(memory)])
    assert [int.from_bytes(memory[n * PAGE : n * PAGE + 4], "little") for n in range(len(pages))] == pages


def test_impossible_reads_are_refused(source: PageSource) -> None:
    with open_pages(source) as reader:
        for pages, size in (([POOL], PAGE), ([-1], PAGE), ([3], PAGE - 1), ([3, 4], PAGE)):
            with pytest.raises(InternalError, match=r"outside 0..127|have .* bytes, the memory meant for them"):
                reader.read_into(pages, [memoryview(bytearray(size))])
        memory = bytearray(PAGE)
        reader.read_into([50], [memoryview(memory)])
        assert memory[:4] == (50).to_bytes(4, "little")


def refused(*_: object) -> int:
    raise OSError(errno.EXDEV, "not here")


whole = os.copy_file_range


def little(fd: int, to_fd: int, nbytes: int, offset: int, to_offset: int) -> int:
    """Fewer bytes than asked for, and no whole page."""
    return whole(fd, to_fd, min(nbytes, PAGE // 2 + 1), offset, to_offset)


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pages_are_copied_from_pool_to_pool(owner: MemoryOwner, data: st.DataObject) -> None:
    """However they lie on both sides, whatever the kernel can do, and nothing beside them is touched."""
    firsts = data.draw(st.lists(st.tuples(st.integers(3, POOL - 7), st.integers(1, 6)), max_size=10))
    there = [first + n for first, count in firsts for n in range(count)]
    size = POOL + 7
    block = data.draw(st.integers(1, 9))  # pages that lie side by side where they go
    blocks = data.draw(st.permutations(range(0, size, block)))
    to_pages = [page for first in blocks for page in range(first, min(first + block, size))][: len(there)]
    kernel = data.draw(st.sampled_from([whole, refused, little]))
    arrived: list[int] = []
    with pytest.MonkeyPatch.context() as patch, closing(MemfdBackend().create(PoolGeometry("to", size, PAGE))) as to:
        with LocalPages(fetch_pool(owner.address, owner.config.token)) as reader:
            patch.setattr(os, "copy_file_range", kernel)
            reader.copy_to(there, to, to_pages, arrived.append)
        found = [os.pread(to.fd, PAGE, page * PAGE) for page in range(size)]
    assert sum(arrived) == len(there) * PAGE
    expected, empty = owner._window.memory(), bytes(PAGE)
    came = dict(zip(to_pages, there, strict=True))
    for page, bytes_there in enumerate(found):
        wanted = expected[came[page] * PAGE : (came[page] + 1) * PAGE] if page in came else empty
        assert bytes_there == wanted


def test_impossible_copies_are_refused(owner: MemoryOwner) -> None:
    with LocalPages(fetch_pool(owner.address, owner.config.token)) as reader:
        for size, there, to_pages in ((PAGE, [3], [1, 2]), (2 * PAGE, [3], [1])):
            with (
                closing(MemfdBackend().create(PoolGeometry("to", 8, size))) as to,
                pytest.raises(InternalError, match="copy: 1 pages of"),
            ):
                reader.copy_to(there, to, to_pages)
        with closing(MemfdBackend().create(PoolGeometry("to", 8, PAGE))) as to:
            for there, to_pages in (([POOL], [1]), ([3], [8]), ([-1], [1])):
                with pytest.raises(InternalError, match="outside 0"):
                    reader.copy_to(there, to, to_pages)
            with owner.pool.holds() as holds:
                assert holds.claim([5])
                with pytest.raises(PagesHeld, match="being freed elsewhere"):
                    reader.copy_to([4, 5], to, [1, 2])
            assert to.resident_bytes() == 0


def test_pages_that_are_being_freed_are_refused(owner: MemoryOwner, source: PageSource) -> None:
    with owner.pool.holds() as holds, open_pages(source) as reader:
        assert holds.claim([5])
        with pytest.raises((PagesHeld, InternalError), match="being freed elsewhere"):
            reader.read_into([4, 5], [memoryview(bytearray(2 * PAGE))])


@pytest.mark.parametrize("token", ["", "wrong", "secret ", "gehëim"])
def test_a_wrong_token_is_refused(source: PageSource, token: str) -> None:
    with pytest.raises(OperatorError, match="token: refused"):
        open_pages(replace(source, token=token))
    assert token not in repr(replace(source, token=token)) or not token


@pytest.mark.parametrize(
    "hello",
    [
        b"",
        b"\n",
        b"[1]\n",
        b"{}\n",
        b'{"version": 1}\n',
        b'{"version": 1, "token": null}\n',
        b'{"version": 1, "token": "secret2"}\n',
        b'{"version": 2, "token": "secret"}\n',
        b"x" * 5000,
        COUNT.pack(1) + RUN.pack(3, 1),
    ],
)
def test_a_stranger_learns_nothing(owner: MemoryOwner, hello: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server, "_HELLO_TIMEOUT_S", 0.2)
    with connect(owner) as client:
        client.sendall(hello + COUNT.pack(1) + RUN.pack(3, 1))
        heard = b""
        try:
            while data := client.recv(4096):
                heard += data
        except ConnectionResetError:  # hung up before it had read everything
            heard += b""
    assert heard in (b"", b'{"error": "token"}\n', b'{"error": "version"}\n')


@pytest.mark.parametrize(
    ("request_bytes", "complaint"),
    [
        (COUNT.pack(0), b"expected 1 to 1024 runs"),
        (COUNT.pack(1 << 31), b"expected 1 to 1024 runs"),
        (COUNT.pack(1) + RUN.pack(POOL, 1), b"outside 0..127"),
        (COUNT.pack(1) + RUN.pack(3, 0), b"outside 0..127"),
        (COUNT.pack(1) + RUN.pack((1 << 64) - 1, (1 << 64) - 1), b"outside 0..127"),
        (COUNT.pack(40) + RUN.pack(0, POOL) * 40, b"more than 16777216 bytes"),
    ],
)
def test_requests_are_bounded(owner: MemoryOwner, request_bytes: bytes, complaint: bytes) -> None:
    with let_in(owner) as client:
        client.sendall(request_bytes)
        heard = b""
        while data := client.recv(4096):
            heard += data
    assert COUNT.unpack_from(heard)[0] == len(heard) - COUNT.size
    assert complaint in heard


@pytest.mark.parametrize("kind", ["silent", "trickling", "idle", "cut off", "never reads"])
def test_slow_clients_are_sent_away_and_hold_nothing(
    owner: MemoryOwner, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_HELLO_TIMEOUT_S", "_IDLE_TIMEOUT_S", "REQUEST_TIMEOUT_S"):
        monkeypatch.setattr(page_server, name, 0.3)
    clients = owner._page_server._clients
    wait_until(lambda: not clients)
    client = connect(owner) if kind in ("silent", "trickling") else let_in(owner)
    wait_until(lambda: bool(clients))
    if kind == "never reads":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(COUNT.pack(32) + RUN.pack(0, POOL) * 32)
    elif kind == "cut off":
        client.sendall(COUNT.pack(3) + RUN.pack(0, 1))
    end_s = time.monotonic() + 20
    while clients:
        assert time.monotonic() < end_s
        if kind == "trickling":
            try:
                client.sendall(b"{")
            except OSError:
                break
        time.sleep(0.05)
    with owner.pool.holds() as holds:
        wait_until(lambda: holds.claim(range(POOL)))
    with open_pages(far(owner)) as reader:
        reader.read_into([3], [memoryview(bytearray(PAGE))])
    client.close()


def test_there_is_room_for_so_many_clients_only(owner: MemoryOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_until(lambda: not owner._page_server._clients)
    monkeypatch.setattr(page_server, "_CLIENTS", 1)
    with let_in(owner), connect(owner) as second:
        second.settimeout(10)
        assert second.recv(10) == b""
    wait_until(lambda: not owner._page_server._clients)
    open_pages(far(owner)).close()


def test_a_client_that_gets_no_thread_is_sent_away_and_the_next_is_served(
    owner: MemoryOwner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wait_until(lambda: not owner._page_server._clients)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(InternalError, match="no answer"):
            open_pages(far(owner), 2)
    assert not owner._page_server._clients
    open_pages(far(owner), 2).close()
    assert "cannot accept: can't start new thread" in caplog.text


@pytest.fixture(scope="module")
def sparse() -> Iterator[MemoryOwner]:
    """An owner of a pool whose table has room for a million extents, and has one."""
    owner = MemoryOwner(config(1 << 20))
    yield owner
    owner.close()


@pytest.mark.parametrize("reach", [{"port": 0}, {"address": ""}], ids=["near", "far"])
def test_of_a_large_table_only_what_is_used_is_read(
    sparse: MemoryOwner, reach: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, read = sparse.pool.resident_bytes(), list[int]()
    with open_pages(replace(sparse.source(), **reach)) as reader:  # type: ignore[arg-type]
        read_into = reader.read_into
        monkeypatch.setattr(reader, "read_into", lambda pages, to: read.append(len(pages)) or read_into(pages, to))
        assert read_table(reader) == sparse._table
    assert sum(read) <= 8
    assert sparse.pool.resident_bytes() == before


def test_reading_pages_that_are_not_there_makes_none(sparse: MemoryOwner) -> None:
    pages, before = range(1 << 19, (1 << 19) + 600), sparse.pool.resident_bytes()
    memory = bytearray(b"x" * (len(pages) * PAGE))
    with open_pages(far(sparse)) as reader:
        reader.read_into(pages, [memoryview(memory)])
    assert not any(memory)
    assert sparse.pool.resident_bytes() == before


def serve_once(*parts: bytes) -> tuple[int, threading.Thread]:
    """Something at a port that says ``parts``, each after hearing something, and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        client = listener.accept()[0]
        for part in parts:
            client.recv(4096)
            client.sendall(part)
        client.close()
        listener.close()

    thread = threading.Thread(target=run)
    thread.start()
    return listener.getsockname()[1], thread


WELCOME = b'{"name": "p", "pages": 8, "page_bytes": 4096}\n'


@pytest.mark.parametrize("kept", [0, 3, 4, 5, 4 + PAGE - 1])
def test_a_truncated_stream_is_an_error(kept: int) -> None:
    port, thread = serve_once(WELCOME, (COUNT.pack(0) + bytes(PAGE))[:kept])
    with open_pages(PageSource("", "127.0.0.1", port, "t")) as reader, pytest.raises(InternalError, match="lost while"):
        reader.read_into([1], [memoryview(bytearray(PAGE))])
    thread.join()


@pytest.mark.parametrize("said", [b"", b"{", b"\n", b"{}\n", b"[]\n", b'{"name": "p", "pages": 8, "page_bytes": 5}\n'])
def test_what_is_no_page_server_is_an_error(said: bytes) -> None:
    port, thread = serve_once(said)
    with pytest.raises(InternalError, match=r"no answer|malformed answer"):
        open_pages(PageSource("", "127.0.0.1", port, "t"))
    thread.join()


def test_a_server_that_falls_silent_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = PageSource("", "127.0.0.1", listener.getsockname()[1], "t")
        with pytest.raises(InternalError, match="no answer: timed out"):
            open_pages(source, 0.1)
        listener.accept()[0].close()
        accepted: list[socket.socket] = []

        def welcome() -> None:
            accepted.append(listener.accept()[0])
            accepted[0].sendall(WELCOME)

        thread = threading.Thread(target=welcome)
        thread.start()
        with open_pages(source, 5, 0.1) as reader, pytest.raises(InternalError, match="lost while reading: timed out"):
            reader.read_into([1], [memoryview(bytearray(PAGE))])
        thread.join()
        accepted[0].close()


def test_nobody_there_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(InternalError, match="no answer"):
        open_pages(PageSource("@concertina-nobody", "127.0.0.1", port, "t"))
    with pytest.raises(InternalError, match="no answer"):
        open_pages(PageSource("@concertina-nobody", "127.0.0.1", 0, "t"))
    with pytest.raises(InternalError, match="neither a socket nor a port"):
        open_pages(PageSource("", "", 0, "t"))


def test_an_impossible_host_is_refused() -> None:
    with pytest.raises(OperatorError, match=r"host '203\.0\.113\.7': cannot listen"):
        MemoryOwner(replace(config(), host="203.0.113.7"))


def test_a_closed_owner_hangs_up() -> None:
    owner = MemoryOwner(config())
    reader = open_pages(far(owner))
    owner.close()
    with pytest.raises(InternalError, match="lost while reading"):
        reader.read_into([3], [memoryview(bytearray(PAGE))])
    reader.close()
