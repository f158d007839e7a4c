"""A pool's memory, taken from the system once and kept, as the memory of a GPU is there from the start."""

from __future__ import annotations

import logging
import os
import threading

from .huge import HugePages
from .memfd import MemfdPool
from .ranges import HUGE_BYTES

_log = logging.getLogger(__name__)
_STEP_BYTES = 64 * HUGE_BYTES


class Reservation:
    """Takes all memory of a pool in a thread of its own; pages that are there keep their contents.

    Where the system has too little, a warning says so, and the rest comes when it is touched.

    Parameters
    ----------
    pool : MemfdPool
    huge : HugePages or None
        Asks for huge pages first; None takes small ones.
    """

    def __init__(self, pool: MemfdPool, huge: HugePages | None) -> None:
        self._pool = pool
        self._huge = huge
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._take, name=f"reserve {pool.geometry.name}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until everything is taken that can be."""
        self._thread.join()

    def close(self) -> None:
        """Take no more; returns when the pool is not touched any more."""
        self._stopped.set()
        self._thread.join()

    def _take(self) -> None:
        try:
            for _ in self._huge.reserve() if self._huge else ():
                if self._stopped.is_set():
                    return
            total = self._pool.geometry.total_bytes
            for offset in range(0, total, _STEP_BYTES):
                if self._stopped.is_set():
                    return
                os.posix_fallocate(self._pool.fd, offset, min(_STEP_BYTES, total - offset))
        except OSError as e:
            there, name = self._pool.resident_bytes(), self._pool.geometry.name
            _log.warning("pool %r: only %d of %d bytes reserved: %s", name, there, self._pool.geometry.total_bytes, e)
