"""Exchange between the members of one host through shared memory."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Sequence
from ctypes import c_uint32
from typing import Any

import torch
from torch import Tensor

from ...errors import InternalError, PeerLost
from . import futex
from .base import BaseExchange, Pending
from .layout import layout_for
from .liveness import MemberLocks
from .mailbox import Head, Inbox, Outbox, memmove
from .members import Members, Patience
from .region import address_of

_GATHER, _DISPATCH, _COMBINE = 1, 2, 3
_CALLS = {_GATHER: "all_gather", _DISPATCH: "dispatch", _COMBINE: "combine"}

# Turns of the waiting loop that only yield the processor before it sleeps; at least one, so that the loop looks
# once more after an `Outbox` has asked for slots. There may be more members than cores, so whoever spins
# takes time from the one that it waits for. Measured on 2 loaded cores, 2 to 4 members: 1 to 200 yields
# are alike, no yields or spinning without them take a quarter more time and CPU, 50 turns of it twice as much.
_YIELDS = 8
_CHECK_S = 0.05
_IDLE_CHECK_S = 0.25

# What a waiting loop repeats: whether anything moved, and the ranks that are still missing.
_Step = Callable[[], tuple[bool, list[int]]]


class SharedMemoryExchange(BaseExchange):
    """Mailboxes between each two members, in a region that all of them have mapped.

    Parameters
    ----------
    region : writable buffer or uint8 CPU tensor
        `region_bytes` bytes of memory shared by all members, all zero when the first member joins, used for one
        exchange only. It is kept mapped (referenced) as long as this object lives.
    rank, size : int
        This member and the number of members.
    capacity_bytes : int
        Payload of one mailbox slot, the same for all members. Longer messages take several rounds.
    timeout_s : float
        A peer that is waited for and shows no sign of life this long counts as hung. It must exceed the longest
        time that a member computes between two calls.
    locks : MemberLocks
        The file that tells dead members.

    Raises
    ------
    OperatorError
        The region does not fit, another member's size or capacity differs, or the machine is not x86-64 Linux.
    InternalError
        The region has been used before, or the rank is taken.
    """

    def __init__(
        self, region: Any, rank: int, size: int, capacity_bytes: int, timeout_s: float, locks: MemberLocks
    ) -> None:
        super().__init__(rank, size, timeout_s)
        futex.require_futex()
        layout = layout_for(size, capacity_bytes)
        origin, self._keep = address_of(region, layout.total)
        self._peers = [(rank + i) % size for i in range(1, size)]  # each starts with another, to spread the load
        self._out = {p: Outbox(layout, origin, rank, p) for p in self._peers}
        self._in = {p: Inbox(layout, origin, p, rank) for p in self._peers}
        self._doorbell_at = origin + layout.doorbell
        self._bell_at = origin + layout.bell(rank)
        self._doorbell = c_uint32.from_address(self._doorbell_at)
        self._bell = c_uint32.from_address(self._bell_at)
        self._check_s = min(_CHECK_S, timeout_s / 4)
        self._members = Members(layout, origin, rank, locks)

    def close(self) -> None:
        """Leave; peers that wait for this member raise `PeerLost`. Blocked calls of other threads end."""
        if not self._closed:
            self._closed = True
            self._members.leave()

    def check(self) -> None:
        super().check()
        self._members.beat()
        self._raise(self._members.verdict() or self._members.dead())

    def _gather(self, row: Sequence[int]) -> list[list[int]]:
        mine = array("q", row)
        n, row_bytes = len(mine), 8 * len(mine)
        all_rows = array("q", bytes(row_bytes * self._size))
        # the same row goes to everyone, so all messages begin at the same address
        transfer = _Transfer(self, _GATHER, mine.buffer_info()[0], [1] * self._size, row_bytes, 0)
        transfer.expect([1] * self._size)
        transfer.finish(all_rows.buffer_info()[0])
        return [all_rows[r * n : (r + 1) * n].tolist() for r in range(self._size)]

    def _begin(self, x: Tensor, in_splits: Sequence[int]) -> Pending:
        return _Dispatch(self, _contiguous(x), in_splits)

    def _combine(self, y: Tensor, in_splits: Sequence[int], out_splits: Sequence[int]) -> Tensor:
        y = _contiguous(y)
        transfer = _Transfer(self, _COMBINE, y.data_ptr(), in_splits, _row_bytes(y))
        transfer.expect(out_splits)
        out = torch.empty((sum(out_splits), y.shape[1]), dtype=y.dtype)
        transfer.finish(out.data_ptr())
        return out

    def _rung(self) -> int:
        return self._doorbell.value

    def _ring(self) -> None:
        futex.add_and_wake(self._doorbell_at)

    def _sleep(self, seen: int, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while self._doorbell.value == seen and not self._closed and self._lost is None:
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return
            if not futex.wait(self._doorbell_at, seen, min(left_s, _IDLE_CHECK_S)):
                self._raise(self._members.dead())
            self._raise(self._members.verdict())
        self._raise(self._members.verdict())

    def _until(self, step: _Step) -> None:
        """Repeat ``step`` until nobody is missing, sleeping while nothing moves."""
        idle = 0
        patience = Patience(self._members, self._timeout_s, self._check_s)
        while True:
            seen = self._bell.value
            moved, missing = step()
            if not missing:
                return
            self._members.beat()
            self.alive_s = time.monotonic()
            self._raise(self._members.verdict())
            if self._closed:
                raise InternalError("exchange: it was closed during a call")
            self._alive()
            idle = 0 if moved else idle + 1
            if moved:
                patience.renew()
            elif idle <= _YIELDS:
                os.sched_yield()
            else:
                futex.wait(self._bell_at, seen, self._check_s)
                self._raise(patience.examine(missing, time.monotonic()))

    def _raise(self, lost: PeerLost | None) -> None:
        if lost is not None:
            self._members.accuse(lost)
            raise self._fail(lost)


class _Transfer:
    """One collective call: every member sends one message, perhaps without rows, to every other."""

    def __init__(
        self, exchange: SharedMemoryExchange, kind: int, address: int, splits: Sequence[int], row_bytes: int,
        stride: int | None = None,
    ) -> None:  # fmt: skip
        self._ex, self._kind, self._row_bytes = exchange, kind, row_bytes
        starts = _starts(splits, row_bytes if stride is None else stride)
        self._own_at, self._own_rows = address + starts[exchange.rank], splits[exchange.rank]
        self._heads: dict[int, Head] = {}
        exchange._members.beat()
        for peer in exchange._peers:
            box = exchange._out[peer]
            box.start(Head(kind, splits[peer], row_bytes), address + starts[peer])
            box.push()

    def rows(self) -> list[int]:
        """Rows by source; waits until every peer has begun this call."""
        self._ex._until(self._look)
        return self._rows_by_source()

    def _rows_by_source(self) -> list[int]:
        return [self._heads[r].rows if r in self._heads else self._own_rows for r in range(self._ex.size)]

    def expect(self, splits: Sequence[int]) -> None:
        """Wait for every peer's message; it must have the rows that ``splits`` says."""
        for rank, (got, expected) in enumerate(zip(self.rows(), splits, strict=True)):
            if got != expected:
                self._ex._raise(PeerLost(rank, f"it sent {got} rows where {expected} were expected"))

    def finish(self, address: int) -> None:
        """Put all rows one behind the other from ``address`` on; returns when all are here and all of ours are out."""
        starts = _starts(self._rows_by_source(), self._row_bytes)
        for peer, head in self._heads.items():
            self._ex._in[peer].accept(head, address + starts[peer])
        if self._own_rows and self._row_bytes:
            memmove(address + starts[self._ex.rank], self._own_at, self._own_rows * self._row_bytes)
        self._ex._until(self._move)

    def _look(self) -> tuple[bool, list[int]]:
        moved = False
        for peer in self._ex._peers:
            if peer not in self._heads and (head := self._ex._in[peer].peek()) is not None:
                self._check(peer, head)
                self._heads[peer] = head
                moved = True
        return moved, [p for p in self._ex._peers if p not in self._heads]

    def _move(self) -> tuple[bool, list[int]]:
        moved, missing = False, []
        for peer in self._ex._peers:
            inbox, outbox = self._ex._in[peer], self._ex._out[peer]
            moved |= inbox.open and inbox.pull()
            moved |= outbox.open and outbox.push()
            if inbox.open or outbox.open:
                missing.append(peer)
        return moved, missing

    def _check(self, peer: int, head: Head) -> None:
        if head.kind != self._kind or (head.rows and head.row_bytes != self._row_bytes):
            self._ex._raise(
                PeerLost(
                    peer,
                    f"it called {_CALLS.get(head.kind, head.kind)} with rows of {head.row_bytes} bytes, "
                    f"rank {self._ex.rank} called {_CALLS[self._kind]} with {self._row_bytes}",
                )
            )


class _Dispatch:
    """Second half of a dispatch; holds the rows that are being sent."""

    def __init__(self, exchange: SharedMemoryExchange, x: Tensor, in_splits: Sequence[int]) -> None:
        self._ex, self._x = exchange, x
        self._transfer = _Transfer(exchange, _DISPATCH, x.data_ptr(), in_splits, _row_bytes(x))

    def wait(self) -> tuple[Tensor, list[int]]:
        splits = self._transfer.rows()
        out = torch.empty((sum(splits), self._x.shape[1]), dtype=self._x.dtype)
        self._transfer.finish(out.data_ptr())
        return out, splits


def _contiguous(x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        raise InternalError(f"exchange: shared memory carries CPU tensors, got one on {x.device}")
    return x.detach().contiguous()


def _row_bytes(x: Tensor) -> int:
    return x.shape[1] * x.element_size()


def _starts(splits: Sequence[int], row_bytes: int) -> list[int]:
    starts, at = [], 0
    for n in splits:
        starts.append(at)
        at += n * row_bytes
    return starts
