"""Who maps a page, kept by the kernel: a mapped page is a shared lock on its bytes in the pool's file.

Freeing a page that someone still maps would turn it into zeros under a running model, silently. So every range
locks what it maps (shared) and freeing needs the exclusive lock. These are open-file-description locks: they die
with their process, need no bookkeeping in the owner, and are still there when a new owner adopts the pool.
The kernel keeps them in a list, so locking costs the square of the number of runs of pages: 5,000 scattered pages take
a third of a second, however many lie together.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence

from ...errors import InternalError
from .backend import runs

_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid


class PagesHeld(InternalError):
    """Pages cannot be freed or mapped now, because a range maps them or an owner frees them.

    Parameters
    ----------
    pool : str
        Name of the pool.
    what : tuple of str
        Keys of the extents concerned, or page numbers where no key is known.
    """

    def __init__(self, pool: str, what: tuple[str, ...]) -> None:
        super().__init__(pool, what)
        self.pool = pool
        self.what = what

    def __str__(self) -> str:
        return f"pool {self.pool!r}: still mapped or being freed elsewhere: {', '.join(self.what)}"


class Holds:
    """One holder's locks on pages of one pool, until it is closed.

    Parameters
    ----------
    fd : int
        The pool's file. A description of its own is opened, because descriptors that were handed over a
        socket share one, and locks of one description never conflict.
    """

    def __init__(self, fd: int, name: str, page_bytes: int) -> None:
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self._name = name
        self._page_bytes = page_bytes

    def __enter__(self) -> Holds:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def share(self, pages: Sequence[int]) -> None:
        """Hold ``pages`` against freeing.

        Raises
        ------
        PagesHeld
            An owner is freeing one of them at this moment; then none of them is held.
        """
        if not self._lock_all(pages, fcntl.F_RDLCK):
            raise PagesHeld(self._name, (f"some of pages {min(pages)}..{max(pages)}",))

    def claim(self, pages: Sequence[int]) -> bool:
        """Hold ``pages`` alone, in order to free them; False, and none is held, if someone maps one of them."""
        return self._lock_all(pages, fcntl.F_WRLCK)

    def held_elsewhere(self, pages: Sequence[int]) -> bool:
        """Whether another holder has one of ``pages``; takes no lock."""
        return any(self._conflict(first, count) for first, count in runs(pages))

    def release(self, pages: Sequence[int]) -> None:
        for first, count in runs(pages):
            self._lock(fcntl.F_UNLCK, first, count)

    def close(self) -> None:
        """Release everything."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock_all(self, pages: Sequence[int], kind: int) -> bool:
        taken: list[tuple[int, int]] = []
        for first, count in runs(pages):
            if not self._lock(kind, first, count):
                for before in taken:
                    self._lock(fcntl.F_UNLCK, *before)
                return False
            taken.append((first, count))
        return True

    def _lock(self, kind: int, first: int, count: int) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, self._flock(kind, first, count))
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def _conflict(self, first: int, count: int) -> bool:
        found = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, self._flock(fcntl.F_WRLCK, first, count))
        return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)

    def _flock(self, kind: int, first: int, count: int) -> bytes:
        start, length = first * self._page_bytes, count * self._page_bytes
        return struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0)
