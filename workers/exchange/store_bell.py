"""A doorbell in a `torch.distributed` store, for members that share no memory."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from ...errors import PeerLost

# The waiting thread asks for the count again this often, in case it missed a key; torch logs a warning each time.
_LOOK_AGAIN = timedelta(minutes=10)
# Keys of older rings are deleted; a thread that lags further behind looks at the count anyway.
_KEPT = 1024
_END_S = 5.0


class StoreBell:
    """Ring number n adds 1 to a counter and sets key n; a thread waits, blocked in the store, for the next key.

    Thus reading the count and waiting for it cost no round trip, and nothing polls. Nor does who rings wait for the
    store, which lives in a process that may hang: a second thread does, once for all that have asked until then.

    Parameters
    ----------
    listening, ringing : Store
        Two connections: the first is blocked nearly always.
    """

    def __init__(self, listening: Store, ringing: Store) -> None:
        self._listening, self._ringing = listening, ringing
        self._asked = threading.Event()
        self._changed = threading.Condition()
        self._rings = 0
        self._closed = False
        self._lost: PeerLost | None = None
        self._threads = [
            threading.Thread(target=work, name="store-bell", daemon=True) for work in (self._ring_on, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def rung(self) -> int:
        """Rings that this member knows of."""
        return self._rings

    def wait(self, seen: int, timeout_s: float) -> None:
        """Sleep until more than ``seen`` rings are known, at most ``timeout_s``.

        Raises
        ------
        PeerLost
            The store has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._rings != seen or self._closed or self._lost, timeout_s)
            if self._lost and not self._closed:
                raise self._lost

    def ring(self) -> None:
        """Have it rung. If that fails, `wait` raises."""
        self._asked.set()

    def close(self) -> None:
        """Stop listening. Rings once, since nothing else ends the thread's wait; others merely look again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._asked.set()
        end_s = time.monotonic() + _END_S
        for thread in self._threads:  # where the store hangs they end when it does
            thread.join(max(0.0, end_s - time.monotonic()))

    def _ring_on(self) -> None:
        try:
            closing = False
            while not closing:
                self._asked.wait()
                self._asked.clear()
                closing = self._closed
                n = self._ringing.add("bell", 1)
                self._ringing.set(f"bell/{n}", "")
                if n > _KEPT:
                    self._ringing.delete_key(f"bell/{n - _KEPT}")
        except RuntimeError as e:
            self._lose(e)

    def _listen(self) -> None:
        try:
            while not self._closed:
                self._count(self._listening.add("bell", 0))
                if not self._closed:  # else the ring of `close` may just have been counted
                    self._await_ring(self._rings + 1)
        except RuntimeError as e:
            self._lose(e)

    def _lose(self, error: RuntimeError) -> None:
        with self._changed:
            self._lost = PeerLost(-1, f"the doorbell's store ended: {error}")
            self._changed.notify_all()

    def _count(self, rings: int) -> None:
        with self._changed:
            if rings > self._rings:
                self._rings = rings
                self._changed.notify_all()

    def _await_ring(self, n: int) -> None:
        try:
            self._listening.wait([f"bell/{n}"], _LOOK_AGAIN)
        except dist.DistStoreError:
            return  # nobody rang
