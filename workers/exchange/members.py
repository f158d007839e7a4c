"""Who takes part in a shared region: joining, leaving, signs of life, and one verdict that all members read."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from ...errors import InternalError, OperatorError, PeerLost
from . import futex
from .layout import REASON_BYTES, Layout
from .liveness import MemberLocks

_JOINED, _LEFT = 1, 2


class Members:
    """The members' lines of a region, seen by one of them.

    A member beats whenever it turns in a waiting loop. So one that waits for a third is not taken for hung; one that
    neither beats nor delivers for ``timeout_s`` is.

    Raises
    ------
    InternalError
        The region has been used before, or the rank is taken.
    OperatorError
        Another member has joined with another size or capacity.
    """

    def __init__(self, layout: Layout, origin: int, rank: int, locks: MemberLocks) -> None:
        self._layout, self._origin, self._rank, self._locks = layout, origin, rank, locks
        self._lines = [(ctypes.c_int64 * 4).from_address(origin + layout.member(r)) for r in range(layout.size)]
        self._fault = ctypes.c_int64.from_address(origin + layout.fault)
        self._reason = (ctypes.c_char * REASON_BYTES).from_address(origin + layout.fault + 8)
        self._own = self._lines[rank]
        self._join()

    def _join(self) -> None:
        if self._own[0]:
            raise InternalError(f"exchange: rank {self._rank}: the region has been used before; each needs a fresh one")
        self._locks.hold(self._rank)
        self._own[1], self._own[2] = self._layout.size, self._layout.capacity
        self._own[0] = _JOINED
        for rank, line in enumerate(self._lines):
            if line[0] and (line[1], line[2]) != (self._layout.size, self._layout.capacity):
                self.leave()
                raise OperatorError(
                    f"exchange: rank {rank} joined with size {line[1]} and capacity {line[2]}, "
                    f"rank {self._rank} with {self._layout.size} and {self._layout.capacity}"
                )

    def leave(self) -> None:
        """Say goodbye, so that peers that still wait for this member stop, and release the lock."""
        self._own[0] = _LEFT
        self._locks.release(self._rank)
        self.wake_all()

    def beat(self) -> None:
        self._own[3] += 1

    def wake_all(self) -> None:
        """Wake every member, whatever it sleeps on."""
        for rank in range(self._layout.size):
            futex.add_and_wake(self._origin + self._layout.bell(rank))
        futex.add_and_wake(self._origin + self._layout.doorbell)

    def accuse(self, lost: PeerLost) -> None:
        """Tell all members; the first verdict stays."""
        if self._fault.value == 0:
            self._reason.value = lost.reason.encode()[: REASON_BYTES - 1]
            self._fault.value = lost.rank + 1
            self.wake_all()

    def verdict(self) -> PeerLost | None:
        """What a member has found, if any has."""
        if self._fault.value == 0:
            return None
        return PeerLost(self._fault.value - 1, self._reason.value.decode(errors="replace"))

    def dead(self) -> PeerLost | None:
        """A peer whose process has ended without leaving, if there is one."""
        for rank, line in enumerate(self._lines):
            if rank != self._rank and line[0] == _JOINED and not self._locks.held(rank) and line[0] == _JOINED:
                return PeerLost(rank, "its process ended")
        return None

    def left(self, ranks: Sequence[int]) -> PeerLost | None:
        """One of ``ranks`` that has left, if there is one."""
        return next((PeerLost(r, "it left the exchange") for r in ranks if self._lines[r][0] == _LEFT), None)

    def beats(self) -> list[int]:
        return [line[3] for line in self._lines]

    def joined(self, rank: int) -> bool:
        return bool(self._lines[rank][0])


class Patience:
    """What one waiting loop knows about the peers that it waits for.

    Parameters
    ----------
    timeout_s : float
        A peer without a sign of life this long is lost.
    check_s : float
        Peers are looked at no more often than this.
    """

    def __init__(self, members: Members, timeout_s: float, check_s: float) -> None:
        self._members, self._timeout_s, self._check_s = members, timeout_s, check_s
        self.renew()

    def renew(self) -> None:
        """Something has arrived: every time-out begins anew at the next look."""
        self._beats: list[int] = []
        self._since_s: list[float] = []
        self._looked_s = 0.0

    def examine(self, ranks: Sequence[int], now_s: float) -> PeerLost | None:
        """A peer that has died, or one of ``ranks`` that has left or hangs, if there is one."""
        if not self._beats:
            self._beats = self._members.beats()
            self._since_s = [now_s] * len(self._beats)
            self._looked_s = now_s
        if now_s - self._looked_s < self._check_s:
            return None
        self._looked_s = now_s
        return self._members.dead() or self._members.left(ranks) or self._hung(ranks, now_s)

    def _hung(self, ranks: Sequence[int], now_s: float) -> PeerLost | None:
        for rank, beat in enumerate(self._members.beats()):
            if beat != self._beats[rank]:
                self._beats[rank], self._since_s[rank] = beat, now_s
        late = [r for r in ranks if now_s - self._since_s[r] > self._timeout_s]
        if not late:
            return None
        did = "gave no sign of life" if self._members.joined(late[0]) else "did not join"
        return PeerLost(late[0], f"it {did} for {self._timeout_s:g} s")
