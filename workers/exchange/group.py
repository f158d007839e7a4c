"""Exchange over a `torch.distributed` process group that belongs to one generation (gloo on CPU, NCCL on CUDA)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Backend, PrefixStore, Store, TCPStore
from torch.distributed import ProcessGroup

from ...errors import InternalError, OperatorError, PeerLost
from .base import BaseExchange, Pending
from .store_bell import StoreBell

GroupBackend = Literal["gloo", "nccl"]
_POLL_S = 0.002
_LOOK_S = 0.25  # who waits notices so late that a member was given up


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where members of one attempt at a generation meet.

    Parameters
    ----------
    host, port : str, int
        A `TCPStore` server, which lives with the controller.
    prefix : str
        Unique to the attempt, for instance ``"gen7.1"``: keys of a failed attempt stay in the store.
    abandoned : callable
        Whether this attempt has been given up; asked while the others are waited for.
    """

    host: str
    port: int
    prefix: str
    abandoned: Callable[[], bool] = lambda: False

    def connect(self, timeout_s: float) -> Store:
        """A connection of its own: one that waits for a key holds its lock, so nobody else can use it.

        Raises
        ------
        InternalError
            Nobody listens there: the controller has ended, and its successor opens another one.
        """
        try:
            store = TCPStore(
                self.host, self.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
            )
        except RuntimeError as e:
            raise InternalError(f"exchange: store at {self.host}:{self.port}: {_first_line(e)}") from e
        return PrefixStore(self.prefix, store)

    def meet(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        """Return once all members have come here. Forming a group cannot be broken off, waiting here can.

        Raises
        ------
        PeerLost
            A member did not come within ``timeout_s``, or the attempt was abandoned.
        """
        came = [f"came/{member}" for member in range(size)]
        store.set(came[rank], "")
        end_s = time.monotonic() + timeout_s
        while not store.check(came):
            if self.abandoned():
                raise PeerLost(-1, "the attempt was abandoned")
            if time.monotonic() > end_s:
                raise PeerLost(-1, f"it did not form a group: it did not come within {timeout_s:g} s")
            time.sleep(_POLL_S)


def make_group(
    backend: GroupBackend, store: Store, rank: int, size: int, timeout_s: float, host: str = ""
) -> ProcessGroup:
    """A process group that is registered nowhere, so that several generations can live in one process.

    Blocks until all members have called it. gloo listens at the address ``host``; without one, where this machine's
    name leads, which often is loopback.

    Raises
    ------
    PeerLost
        A member did not come within ``timeout_s``.
    OperatorError
        The backend is not in this build of torch.
    """
    timeout = timedelta(seconds=timeout_s)
    with _peers_may_be_lost("did not form a group"):
        group = ProcessGroup(store, rank, size)
        if backend == "gloo":
            kind, device = ProcessGroup.BackendType.GLOO, torch.device("cpu")
            transport: Backend = _gloo(store, rank, size, timeout, host)
        elif backend == "nccl" and dist.is_nccl_available() and torch.cuda.is_available():
            kind, device = ProcessGroup.BackendType.NCCL, torch.device("cuda", torch.cuda.current_device())
            transport = _nccl(store, rank, size, timeout, device)
        else:
            raise OperatorError(f"exchange: backend: expected gloo, or nccl with CUDA, got {backend!r}")
        transport._set_sequence_number_for_group()
        group._set_default_backend(kind)
        group._register_backend(device, kind, transport)
    return group


def _gloo(store: Store, rank: int, size: int, timeout: timedelta, host: str) -> Backend:
    gloo: Any = dist.ProcessGroupGloo  # torch's type stubs know other options than it has
    if not host:
        return cast(Backend, gloo(store, rank, size, timeout))
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [gloo.create_device(hostname=host)]
    return cast(Backend, gloo(store, rank, size, options))


def _nccl(store: Store, rank: int, size: int, timeout: timedelta, device: torch.device) -> Backend:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    transport = dist.ProcessGroupNCCL(store, rank, size, options)
    transport.eager_connect_single_device(device)
    return transport


class GroupExchange(BaseExchange):
    """All-to-all of a process group; the doorbell is a counter in the store.

    A lost peer shows as an error of the group, which cannot say who it was: `PeerLost` has rank -1. One that hangs,
    or whose machine is silent, is noticed after ``timeout_s``; with gloo soon after `give_up`.

    Parameters
    ----------
    rendezvous : Rendezvous
        Where the members meet.
    rank, size : int
        This member and the number of members.
    timeout_s : float
        Longest time for forming the group and for each operation; it must exceed the longest time that a
        member computes between two calls.
    backend : {"gloo", "nccl"}
        nccl takes CUDA tensors of the current device.
    host : str
        Address of this member, at which the others reach it with gloo; empty: where the machine's name leads.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        rank: int,
        size: int,
        timeout_s: float,
        backend: GroupBackend = "gloo",
        host: str = "",
    ) -> None:
        super().__init__(rank, size, timeout_s)
        self._look_s = _LOOK_S if backend == "gloo" else timeout_s  # NCCL would abort what takes longer
        self._unended: dist.Work | None = None  # the last operation, while its end has not been seen
        self._device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", torch.cuda.current_device())
        store = rendezvous.connect(timeout_s)
        with _peers_may_be_lost("did not form a group"):
            rendezvous.meet(store, rank, size, timeout_s)
        self._group = make_group(backend, store, rank, size, timeout_s, host)
        self._bell = StoreBell(rendezvous.connect(timeout_s), rendezvous.connect(timeout_s))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._bell.close()
        group, work = self._group, self._unended
        if work is None:
            with self._poisoning(), _peers_may_be_lost("ended while the group was closed"):
                group.shutdown()
        else:  # nothing can break it off, and who ends the group before, or lets go of it, waits for that
            threading.Thread(target=_end_later, args=(group, work), name="group-end", daemon=True).start()

    def _gather(self, row: Sequence[int]) -> list[list[int]]:
        mine = torch.tensor(row, dtype=torch.int64, device=self._device)
        rows = [torch.empty_like(mine) for _ in range(self._size)]
        with self._poisoning(), _peers_may_be_lost("did not answer an all_gather"):
            self._await(self._group.allgather([rows], [mine]))
        return [r.tolist() for r in rows]

    def _begin(self, x: Tensor, in_splits: Sequence[int]) -> Pending:
        self._check_device(x)
        out_splits = self._swap_counts(in_splits)
        return _Dispatch(self, x, list(in_splits), out_splits)

    def _combine(self, y: Tensor, in_splits: Sequence[int], out_splits: Sequence[int]) -> Tensor:
        self._check_device(y)
        out, work = self._start(y, in_splits, out_splits)
        self._finish(work)
        return out

    def _rung(self) -> int:
        return self._bell.rung()

    def _sleep(self, seen: int, timeout_s: float) -> None:
        with self._poisoning():
            self._bell.wait(seen, timeout_s)

    def _ring(self) -> None:
        with self._poisoning():
            self._bell.ring()

    def _swap_counts(self, in_splits: Sequence[int]) -> list[int]:
        mine = torch.tensor(in_splits, dtype=torch.int64, device=self._device)
        theirs = torch.empty_like(mine)
        with self._poisoning(), _peers_may_be_lost("did not answer a dispatch"):
            self._await(self._group.alltoall_base(theirs, mine, [], []))
        return [int(n) for n in theirs.tolist()]

    def _start(self, x: Tensor, in_splits: Sequence[int], out_splits: Sequence[int]) -> tuple[Tensor, dist.Work | None]:
        """Begin the all-to-all of rows, as bytes since gloo knows few types; None if rows have no bytes."""
        x = x.detach().contiguous()
        out = torch.empty((sum(out_splits), x.shape[1]), dtype=x.dtype, device=x.device)
        if x.shape[1] == 0:
            return out, None
        with self._poisoning(), _peers_may_be_lost("did not take part in an exchange"):
            work = self._group.alltoall_base(_bytes(out), _bytes(x), list(out_splits), list(in_splits))
        self._unended = work
        return out, work

    def _finish(self, work: dist.Work | None) -> None:
        if work is not None:
            with self._poisoning(), _peers_may_be_lost("did not take part in an exchange"):
                self._await(work)

    def _await(self, work: dist.Work) -> None:
        """Block until done. With a time-out, NCCL's wait blocks the CPU too, and so notices lost peers."""
        self._unended = work
        end_s = time.monotonic() + self._timeout_s
        while True:
            try:
                work.wait(timedelta(seconds=self._look_s))
                break
            except RuntimeError:
                if work.is_completed():  # with an error of its own; or it has just come, as this slice ended
                    self._unended = None
                    work.wait(timedelta(seconds=self._look_s))
                    return
                self._alive()
                if time.monotonic() > end_s:
                    raise
        self._unended = None

    def _check_device(self, x: Tensor) -> None:
        if x.device.type != self._device.type:
            raise InternalError(f"exchange: expected a tensor on {self._device}, got one on {x.device}")

    @contextmanager
    def _poisoning(self) -> Iterator[None]:
        try:
            yield
        except PeerLost as lost:
            raise self._fail(lost) from lost.__cause__


def _end_later(group: ProcessGroup, work: dist.Work) -> None:
    """Keep a group until its last operation has ended."""
    with suppress(RuntimeError):  # it has failed, as was known
        work.wait()
    with suppress(RuntimeError):
        group.shutdown()


class _Dispatch:
    """Second half of a dispatch; holds the rows that are being sent."""

    def __init__(self, exchange: GroupExchange, x: Tensor, in_splits: list[int], out_splits: list[int]) -> None:
        self._ex, self._splits = exchange, out_splits
        self._x = x.detach().contiguous()
        self._out, self._work = exchange._start(self._x, in_splits, out_splits)

    def wait(self) -> tuple[Tensor, list[int]]:
        self._ex._finish(self._work)
        return self._out, self._splits


def _bytes(x: Tensor) -> Tensor:
    """The rows of ``x`` as bytes; a tensor without elements may have strides that cannot be viewed."""
    if x.numel() == 0:
        return x.new_empty((x.shape[0], x.shape[1] * x.element_size()), dtype=torch.uint8)
    return x.view(torch.uint8)


@contextmanager
def _peers_may_be_lost(what: str) -> Iterator[None]:
    """Errors of `torch.distributed` (all of them RuntimeError) become `PeerLost`."""
    try:
        yield
    except RuntimeError as e:
        raise PeerLost(-1, f"it {what}: {_first_line(e)}") from e


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
