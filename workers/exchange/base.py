"""What every exchange offers, and what the implementations have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf
from typing import Protocol, TypeVar

from torch import Tensor

from ...errors import InternalError, PeerLost

T = TypeVar("T")


class Pending(Protocol):
    """A dispatch whose rows are on their way; its owner may compute meanwhile."""

    def wait(self) -> tuple[Tensor, list[int]]:
        """Rows by source rank, and how many came from each; call it once."""
        ...


class Exchange(Protocol):
    """Rows and small agreements between the members of one generation.

    All members make the same collective calls in the same order, from one thread each; `ring`, `give_up`
    and `close` may come from any thread. Every method raises `PeerLost` once a member has died, hung or left,
    and goes on raising it: a broken exchange is replaced, never repaired.
    """

    alive_s: float
    """When this member last moved, by `time.monotonic`: it came back from a call, or looked around in one. Where it
    sleeps, the latest time at which it wakes; `inf` before its first call. Who uses it may note other progress."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_gather(self, row: Sequence[int]) -> list[list[int]]:
        """Every member's row of int64, by rank; all rows have the same length."""
        ...

    def dispatch(self, x: Tensor, in_splits: Sequence[int]) -> tuple[Tensor, list[int]]:
        """``x`` [N, W] ordered by destination becomes rows ordered by source, and how many came from each."""
        ...

    def begin_dispatch(self, x: Tensor, in_splits: Sequence[int]) -> Pending:
        """The first half of `dispatch`; ``x`` must stay as it is until the second, `Pending.wait`."""
        ...

    def combine(self, y: Tensor, in_splits: Sequence[int], out_splits: Sequence[int]) -> Tensor:
        """The way back: ``in_splits`` says where ``y``'s rows go, ``out_splits`` how many come from each rank."""
        ...

    def doorbell(self) -> int:
        """How often the bell has rung; read it once before each `all_gather` that may lead to `wait`."""
        ...

    def wait(self, seen: int, timeout_s: float) -> None:
        """Sleep until the bell has rung beyond ``seen``, at most ``timeout_s``, which is the same for all members."""
        ...

    def ring(self) -> None:
        """Wake every member that waits; on a closed exchange, nothing."""
        ...

    def check(self) -> None:
        """Look, without waiting, whether all members are there, as far as that can be known."""
        ...

    def give_up(self, reason: str) -> None:
        """From any thread: a member is lost, which may not show here. Who sleeps is woken, and who waits for others
        notices when it looks around."""
        ...

    def close(self) -> None: ...


class BaseExchange(ABC):
    """Poisoning, argument checks and the doorbell's agreement.

    Members read the doorbell at slightly different moments. If one of them slept on the value that it read,
    a ring that it had already counted, but a peer had not, would wake the peer alone, which would then wait
    for it in vain. So `all_gather` carries the values, and all members sleep on the least.

    Parameters
    ----------
    rank, size : int
        This member and the number of members.
    timeout_s : float
        How long a call waits for a member that shows no sign of life.
    """

    def __init__(self, rank: int, size: int, timeout_s: float) -> None:
        if not 0 <= rank < size:
            raise InternalError(f"exchange: rank: expected 0 <= rank < size, got rank {rank} of size {size}")
        self._rank = rank
        self._size = size
        self._timeout_s = timeout_s
        self._lost: PeerLost | None = None
        self._closed = False
        self._pending = False
        self._seen = 0
        self._agreed: int | None = None
        self.alive_s = inf

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def all_gather(self, row: Sequence[int]) -> list[list[int]]:
        self._usable()
        rows = self._waiting(lambda: self._gather([*row, self._seen]), self._timeout_s)
        self._agreed = min(r[-1] for r in rows)
        return [r[:-1] for r in rows]

    def dispatch(self, x: Tensor, in_splits: Sequence[int]) -> tuple[Tensor, list[int]]:
        return self.begin_dispatch(x, in_splits).wait()

    def begin_dispatch(self, x: Tensor, in_splits: Sequence[int]) -> Pending:
        self._usable()
        self._check_splits("dispatch: in_splits", in_splits, x)
        begun = self._waiting(lambda: self._begin(x, in_splits), self._timeout_s)
        self._pending = True
        return _Begun(self, begun)

    def combine(self, y: Tensor, in_splits: Sequence[int], out_splits: Sequence[int]) -> Tensor:
        self._usable()
        self._check_splits("combine: in_splits", in_splits, y)
        self._check_splits("combine: out_splits", out_splits, None)
        mine, back = in_splits[self._rank], out_splits[self._rank]
        if mine != back:
            raise InternalError(f"combine: rank {self._rank} sends {mine} rows to itself and expects {back}")
        return self._waiting(lambda: self._combine(y, in_splits, out_splits), self._timeout_s)

    def doorbell(self) -> int:
        self._usable()
        self._seen = self._rung()
        self._agreed = None
        return self._seen

    def wait(self, seen: int, timeout_s: float) -> None:
        self._usable()
        least = seen if self._agreed is None else min(seen, self._agreed)
        self._waiting(lambda: self._sleep(least, timeout_s), timeout_s)

    def ring(self) -> None:
        if not self._closed:
            self._alive()  # not `_usable`: other threads ring while a dispatch is pending
            self._ring()

    def check(self) -> None:
        self._usable()

    def give_up(self, reason: str) -> None:
        if not self._closed:
            self._fail(PeerLost(-1, reason))
            with suppress(PeerLost):  # of a bell that has ended, too: then nobody sleeps on it
                self._ring()

    @abstractmethod
    def _gather(self, row: Sequence[int]) -> list[list[int]]: ...
    @abstractmethod
    def _begin(self, x: Tensor, in_splits: Sequence[int]) -> Pending: ...
    @abstractmethod
    def _combine(self, y: Tensor, in_splits: Sequence[int], out_splits: Sequence[int]) -> Tensor: ...
    @abstractmethod
    def _rung(self) -> int: ...
    @abstractmethod
    def _sleep(self, seen: int, timeout_s: float) -> None: ...
    @abstractmethod
    def _ring(self) -> None: ...
    @abstractmethod
    def close(self) -> None: ...

    def _waiting(self, call: Callable[[], T], most_s: float) -> T:
        """What ``call`` returns, which may sleep for ``most_s`` before it looks around."""
        self.alive_s = time.monotonic() + most_s
        result = call()
        self.alive_s = time.monotonic()
        return result

    def _fail(self, lost: PeerLost) -> PeerLost:
        """Poison this exchange; returns the error to raise, which is the first one seen."""
        if self._lost is None:
            self._lost = lost
        return self._lost

    def _alive(self) -> None:
        if self._lost is not None:
            raise PeerLost(self._lost.rank, self._lost.reason)
        if self._closed:
            raise InternalError("exchange: it is closed")

    def _usable(self) -> None:
        self._alive()
        if self._pending:
            raise InternalError("exchange: a dispatch is pending; wait for it first")

    def _check_splits(self, name: str, splits: Sequence[int], x: Tensor | None) -> None:
        if len(splits) != self._size or min(splits) < 0:
            raise InternalError(f"{name}: expected {self._size} counts of at least 0, got {list(splits)}")
        if x is not None and (x.dim() != 2 or x.shape[0] != sum(splits)):
            raise InternalError(f"{name}: {list(splits)} does not fit rows of shape {tuple(x.shape)}")


class _Begun:
    """Second half of a dispatch."""

    def __init__(self, exchange: BaseExchange, dispatch: Pending) -> None:
        self._ex, self._dispatch = exchange, dispatch

    def wait(self) -> tuple[Tensor, list[int]]:
        ex = self._ex
        ex._pending = False
        ex._usable()
        return ex._waiting(self._dispatch.wait, ex._timeout_s)
