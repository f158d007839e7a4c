"""The shared region: its layout, and what is refused."""

from __future__ import annotations

import mmap
import os
import threading
from itertools import pairwise

import pytest
import torch
from concertina.errors import InternalError, OperatorError, PeerLost
from concertina.workers.exchange import futex
from concertina.workers.exchange.base import Exchange
from concertina.workers.exchange.layout import LINE, SLOTS, layout_for, region_bytes
from concertina.workers.exchange.liveness import MemberLocks
from concertina.workers.exchange.region import address_of
from concertina.workers.exchange.shared import SharedMemoryExchange
from hypothesis import given
from hypothesis import strategies as st

from .crew import Region, run_threads


@given(size=st.integers(1, 9), capacity=st.integers(1, 1000))
def test_layout_parts_are_disjoint_lines(size: int, capacity: int) -> None:
    a = layout_for(size, capacity)
    ranks, pairs = range(size), [(s, d) for s in range(size) for d in range(size)]
    parts = [(a.member(r), LINE) for r in ranks] + [(a.bell(r), LINE) for r in ranks]
    parts += [(a.doorbell, LINE), (a.fault, 5 * LINE)]
    parts += [(at(s, d), LINE) for at in (a.sent, a.taken) for s, d in pairs]
    parts += [(a.slot(s, d, i), LINE + a.capacity) for s, d in pairs for i in range(SLOTS)]
    parts.sort()
    assert a.capacity >= capacity
    assert all(start % LINE == 0 for start, _ in parts)
    assert all(start + n == after for (start, n), (after, _) in pairwise(parts))
    assert parts[-1][0] + parts[-1][1] == region_bytes(size, capacity) == a.total


def test_buffers_and_tensors_are_regions() -> None:
    tensor = torch.zeros(1024, dtype=torch.uint8)
    assert address_of(tensor, 1024)[0] == tensor.data_ptr()
    pages = mmap.mmap(-1, 4096)
    address, keep = address_of(memoryview(pages), 4096)
    pages[0] = 7
    assert torch.frombuffer(pages, dtype=torch.uint8).data_ptr() == address
    del keep


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (torch.zeros(1024, dtype=torch.int32), "contiguous uint8"),
        (torch.zeros(64, 64, dtype=torch.uint8)[:, ::2], "contiguous uint8"),
        (torch.zeros(1023, dtype=torch.uint8), "at least 1024 bytes"),
        (torch.zeros(2048, dtype=torch.uint8)[1:], "multiple of 64"),
        (bytes(1024), "writable"),
        (mmap.mmap(-1, 512), "at least 1024 bytes"),
    ],
)
def test_unfit_regions_are_refused(region: object, message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        address_of(region, 1024)


def test_members_must_agree() -> None:
    region = Region(2, 128)
    first = region.member(0)
    with pytest.raises(InternalError, match="used before"):
        region.member(0)
    region.capacity = 64
    with pytest.raises(OperatorError, match="rank 0 joined with size 2 and capacity 128, rank 1 with 2 and 64"):
        region.member(1)
    region.capacity = 128
    with pytest.raises(InternalError, match="used before"):
        region.member(1)
    first.close()
    region.close()


def test_two_members_of_one_rank() -> None:
    region = Region(1, 64)
    locks = MemberLocks(region.fd, 0)
    locks.hold(0)
    with pytest.raises(InternalError, match="rank 0 is taken"):
        region.member(0)
    assert not locks.held(0), "an own lock is not another member's"
    other = MemberLocks(region.fd, 0)
    assert other.held(0)
    locks.release(0)
    assert not other.held(0)
    other.hold(0)
    fd = other._fd
    del other
    assert not locks.held(0), "its lock goes with the last reference"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    region.close()


def test_locks_need_a_file() -> None:
    read_only = os.open("/dev/null", os.O_RDONLY)
    os.close(read_only)
    with pytest.raises(OperatorError, match="lock file"):
        MemberLocks(read_only, 0)


@pytest.mark.parametrize(("rank", "size"), [(-1, 2), (2, 2), (0, 0)])
def test_bad_ranks(rank: int, size: int) -> None:
    region = Region(2, 64)
    with pytest.raises(InternalError, match="expected 0 <= rank < size"):
        SharedMemoryExchange(torch.zeros(1 << 16, dtype=torch.uint8), rank, size, 64, 1.0, MemberLocks(region.fd, 0))
    region.close()


@pytest.mark.parametrize("splits", [[1], [1, 1, 1], [3, -1], [1, 0]])
def test_splits_must_fit(splits: list[int]) -> None:
    def work(ex: Exchange) -> None:
        for call in (
            lambda: ex.dispatch(torch.zeros(2, 3), splits),
            lambda: ex.combine(torch.zeros(2, 3), splits, [1, 1]),
        ):
            with pytest.raises(InternalError, match="in_splits"):
                call()
        ex.all_gather([1])  # nothing was sent: all goes on

    run_threads(2, 64, work)


@pytest.mark.parametrize("first", ["dispatch", "combine", "wider", "gather"])
def test_members_that_disagree_about_the_call(first: str) -> None:
    """A fault of ours, but it must not hang or deliver garbage."""

    def work(ex: Exchange) -> str:
        x = torch.zeros(2, 3)
        calls = {
            "dispatch": lambda: ex.dispatch(x, [1, 1]),
            "combine": lambda: ex.combine(x, [1, 1], [1, 1]),
            "wider": lambda: ex.dispatch(torch.zeros(2, 4), [1, 1]),
            "gather": lambda: ex.all_gather([1, 2, 3]),
            "other": lambda: ex.dispatch(torch.zeros(2, 5), [1, 1]),
        }
        with pytest.raises(PeerLost) as e:
            calls[first if ex.rank == 0 else "other"]()
        return e.value.reason

    assert all("called" in reason for reason in run_threads(2, 64, work))


def test_combine_checks_what_comes_back() -> None:
    """Who notices raises; the other may have all its rows, but its next call raises the same."""

    def work(ex: Exchange) -> None:
        x = torch.zeros(2, 3)
        with pytest.raises(InternalError, match=f"rank {ex.rank} sends 1 rows to itself and expects 2"):
            ex.combine(x, [1, 1], [2, 2])
        expected = [1, 1] if ex.rank else [1, 2]

        def calls() -> None:
            ex.combine(x, [1, 1], expected)
            ex.all_gather([1])

        with pytest.raises(PeerLost, match="rank 1 was lost: it sent 1 rows where 2 were expected"):
            calls()

    run_threads(2, 64, work)


def test_other_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(OperatorError, match=r"x86-64.*aarch64.*gloo"):
        futex.require_futex()


def test_futex_errors_are_told() -> None:
    with pytest.raises(OSError, match="FUTEX_WAIT: EFAULT"):
        futex.wait(0, 0, 0.1)
    with pytest.raises(OSError, match="FUTEX_WAKE_OP: EFAULT"):
        futex.add_and_wake(0)


def test_closed_from_another_thread() -> None:
    region = Region(2, 64)
    ex, other = region.member(0), region.member(1)
    threading.Timer(0.05, ex.close).start()
    with pytest.raises(InternalError, match="closed during a call"):
        ex.all_gather([1])
    other.close()
    region.close()
