"""Who is alive: each member holds the lock on its own byte of a file that all can open.

The kernel drops the lock when the process ends, however it ends, and anybody can ask for it without the
owner's help, across PID namespaces, where process ids and pidfds mean nothing. Alternatives: a Unix socket per pair
needs a rendezvous and N^2 descriptors; robust futexes belong to threads, not processes; classic POSIX record
locks vanish when any descriptor of the file is closed, which page owners' clients do. Hence "open file
description" locks (man 2 fcntl), on a description of our own: descriptors that came over a socket all share one.
A child that was forked without exec would keep its parent's lock; Concertina does not fork.
"""

from __future__ import annotations

import fcntl
import os
import struct
import weakref

from ...errors import InternalError, OperatorError

_FLOCK = "hhqqi4x"  # struct flock on x86-64: l_type, l_whence, l_start, l_len, l_pid


class MemberLocks:
    """Byte locks of one group of members.

    Parameters
    ----------
    fd : int
        Any descriptor of a file that all members can open, for instance the memfd that holds their region.
        It is opened anew, for writing; the caller keeps its own.
    base : int
        Member r locks byte ``base + r``, which need not exist. Groups on one file use disjoint ranges, for
        instance the offsets of their regions.
    """

    def __init__(self, fd: int, base: int) -> None:
        try:
            self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        except OSError as e:
            raise OperatorError(f"exchange: lock file: cannot open descriptor {fd} for writing: {e}") from e
        self._base = base
        # Not before: another thread may be asking, and a number that is used again would answer for another file.
        weakref.finalize(self, os.close, self._fd)

    def hold(self, rank: int) -> None:
        """Take this member's lock.

        Raises
        ------
        InternalError
            Somebody else holds it: two members of one rank.
        """
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, self._flock(rank, fcntl.F_WRLCK))
        except (BlockingIOError, PermissionError) as e:
            raise InternalError(f"exchange: rank {rank} is taken by another process") from e

    def release(self, rank: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, self._flock(rank, fcntl.F_UNLCK))

    def held(self, rank: int) -> bool:
        """Whether another member holds the lock of ``rank``."""
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, self._flock(rank, fcntl.F_WRLCK))
        return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)

    def _flock(self, rank: int, kind: int) -> bytes:
        return struct.pack(_FLOCK, kind, os.SEEK_SET, self._base + rank, 1, 0)
