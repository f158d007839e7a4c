"""Process groups: what is refused, and what needs a GPU."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from concertina.errors import InternalError, OperatorError, PeerLost
from concertina.workers.exchange.group import GroupExchange, Rendezvous, make_group
from concertina.workers.exchange.store_bell import StoreBell
from torch.distributed import TCPStore

from . import scenarios


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_alone(store: TCPStore) -> None:
    ex = GroupExchange(Rendezvous("127.0.0.1", store.port, "a"), 0, 1, 10.0)
    scenarios.random_rounds(ex, seed=3, rounds=20)
    scenarios.every_dtype(ex)
    assert scenarios.doorbell_stress(ex, seed=1, items=30) == 30
    ex.close()
    ex.close()
    with pytest.raises(InternalError, match="closed"):
        ex.all_gather([1])


def test_nobody_listens() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = server.port
    del server
    with pytest.raises(InternalError, match=f"store at 127.0.0.1:{port}"):
        Rendezvous("127.0.0.1", port, "a").connect(0.2)


def test_a_member_that_never_comes(store: TCPStore) -> None:
    with pytest.raises(PeerLost, match="a peer was lost: it did not form a group"):
        GroupExchange(Rendezvous("127.0.0.1", store.port, "b"), 0, 2, 0.5)


STORE = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


def test_nobody_who_rings_waits_for_a_store_that_hangs() -> None:
    """It lives with the controller; who rings is who takes requests, and gives tokens out."""
    with subprocess.Popen([sys.executable, "-c", STORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        store = Rendezvous("127.0.0.1", int(process.stdout.readline()), "a")
        bells = [StoreBell(store.connect(20.0), store.connect(20.0)) for _ in range(2)]
        try:
            os.kill(process.pid, signal.SIGSTOP)
            seen = bells[1].rung()
            ringing = threading.Thread(target=lambda: [bells[0].ring() for _ in range(100)])
            ringing.start()
            ringing.join(10.0)
            assert not ringing.is_alive()
            bells[1].wait(seen, 0.1)
            assert bells[1].rung() == seen
            os.kill(process.pid, signal.SIGCONT)
            bells[1].wait(seen, 20.0)
            assert seen < bells[1].rung() <= seen + 100
            process.kill()
            process.wait()
            bells[0].ring()
            while bells[0]._lost is None:
                time.sleep(0.001)
            with pytest.raises(PeerLost, match="the doorbell's store ended"):
                bells[0].wait(bells[0].rung(), 20.0)
        finally:
            process.kill()
            for bell in bells:
                bell.close()


def test_waiting_for_a_member_can_be_broken_off(store: TCPStore) -> None:
    given_up = threading.Event()
    rendezvous = Rendezvous("127.0.0.1", store.port, "f", given_up.is_set)
    threading.Timer(0.2, given_up.set).start()
    with pytest.raises(PeerLost, match="abandoned"):
        GroupExchange(rendezvous, 0, 2, 60.0)


class _Late:
    """An operation that ends at the same moment as the slice in which it was waited for."""

    def __init__(self, error: str) -> None:
        self.error, self.waits = error, 0

    def wait(self, timeout: object) -> None:
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.error:
            raise RuntimeError(self.error)

    def is_completed(self) -> bool:
        return True


@pytest.mark.parametrize("error", ["", "Connection closed by peer"])
def test_what_comes_just_as_a_slice_ends_has_come(store: TCPStore, error: str) -> None:
    ex = GroupExchange(Rendezvous("127.0.0.1", store.port, "g"), 0, 1, 10.0)
    late = _Late(error)
    if error:
        with pytest.raises(RuntimeError, match=error):
            ex._await(late)  # type: ignore[arg-type]
    else:
        ex._await(late)  # type: ignore[arg-type]
    assert (late.waits, ex._unended) == (2, None)
    ex.close()


@pytest.mark.parametrize("asleep", [True, False])
def test_giving_up_reaches_who_sleeps_and_what_is_on_its_way(store: TCPStore, asleep: bool) -> None:
    """The other member neither answers nor goes, and closing waits for none of that."""

    def join(rank: int) -> GroupExchange:
        return GroupExchange(Rendezvous("127.0.0.1", store.port, f"h{asleep}"), rank, 2, 120.0)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(join, range(2))
        if asleep:
            seen = first.doorbell()
            sleeping = threads.submit(first.wait, seen, 60.0)
            time.sleep(0.05)
            first.give_up("told")
            sleeping.result(20)
            with pytest.raises(PeerLost, match="told"):
                first.all_gather([1])
        else:
            rows, peer = torch.ones(2, 3), threads.submit(second._swap_counts, [1, 1])
            pending = first.begin_dispatch(rows, [1, 1])  # their numbers are known, the rows never come
            peer.result(20)
            first.give_up("told")
            with pytest.raises(PeerLost, match="told"):
                pending.wait()
        done = threads.submit(first.close)
        done.result(20)
        second.close()


def listening_at(host: str) -> bool:
    address = socket.inet_aton(host)[::-1].hex().upper()
    lines = Path("/proc/net/tcp").read_text().splitlines()
    return any(f" {address}:" in line and " 0A " in line for line in lines)


def test_members_listen_at_their_own_addresses(store: TCPStore) -> None:
    hosts = ["127.0.7.1", "127.0.7.2"]

    def join(rank: int) -> GroupExchange:
        return GroupExchange(Rendezvous("127.0.0.1", store.port, "e"), rank, 2, 20.0, "gloo", hosts[rank])

    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(join, range(2)))
        assert all(map(listening_at, hosts))
        assert list(threads.map(lambda ex: ex.all_gather([ex.rank]), both)) == [[[0], [1]]] * 2
        list(threads.map(lambda ex: ex.close(), both))


def test_unknown_backend(store: TCPStore) -> None:
    with pytest.raises(OperatorError, match="expected gloo, or nccl with CUDA, got 'mpi'"):
        make_group("mpi", store, 0, 1, 1.0)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nccl is no error")
def test_nccl_without_a_gpu(store: TCPStore) -> None:
    with pytest.raises(OperatorError, match="got 'nccl'"):
        make_group("nccl", store, 0, 1, 1.0)


def test_other_devices_are_refused(store: TCPStore) -> None:
    ex = GroupExchange(Rendezvous("127.0.0.1", store.port, "d"), 0, 1, 10.0)
    with pytest.raises(InternalError, match="expected a tensor on cpu, got one on meta"):
        ex.dispatch(torch.empty(1, 1, device="meta"), [1])
    ex.close()


def test_the_store_ends() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ex = GroupExchange(Rendezvous("127.0.0.1", server.port, "e"), 0, 1, 10.0)
    seen = ex.doorbell()
    del server
    with pytest.raises(PeerLost, match="the doorbell's store ended"):
        ex.wait(seen, 60.0)
    ex.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU")
def test_nccl_alone(store: TCPStore) -> None:
    ex = GroupExchange(Rendezvous("127.0.0.1", store.port, "c"), 0, 1, 30.0, "nccl")
    x = torch.randn(3, 8, device="cuda")
    rows, splits = ex.dispatch(x, [3])
    assert splits == [3]
    assert torch.equal(ex.combine(rows, splits, [3]), x)
    assert ex.all_gather([1, 2]) == [[1, 2]]
    ex.close()
