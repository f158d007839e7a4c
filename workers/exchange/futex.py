"""Sleeping and waking on a 32-bit word of shared memory (Linux futexes, man 2 futex).

Memory order. Members publish by plain stores through ctypes and memmove. On x86-64 that suffices: stores become
visible in program order, loads are not reordered with each other, and aligned stores of 4 or 8 bytes are atomic. A
weaker machine (ARM) would need a release barrier between the payload and its sequence word and an acquire barrier
after reading one, for which CPython offers nothing; `require_futex` therefore refuses other machines, where
`GroupExchange` serves.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import sys

from ...errors import OperatorError

_SYS_FUTEX = 202  # x86-64
_WAIT, _WAKE_OP = 0, 5  # without FUTEX_PRIVATE_FLAG: the word is shared between processes
_ALL = 2**31 - 1
# FUTEX_OP(FUTEX_OP_ADD, 1, FUTEX_OP_CMP_EQ, 0): *word += 1 atomically
_ADD_ONE = (1 << 28) | (1 << 12)

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long,) * 7


def require_futex() -> None:
    """Raise `OperatorError` where these words would not work."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise OperatorError(
            f"shared memory exchange: needs Linux on x86-64, this is {sys.platform} on {platform.machine()}; "
            "use the gloo exchange"
        )


def add_and_wake(address: int) -> None:
    """Add 1 to the word, atomically among all processes, and wake whoever sleeps on it.

    FUTEX_WAKE_OP lets the kernel do the addition, which Python could not do atomically. It is a full
    barrier too: everything stored before is visible to whoever sees the new value.
    """
    if _syscall(_SYS_FUTEX, address, _WAKE_OP, _ALL, 0, address, _ADD_ONE) < 0:
        raise _failed("FUTEX_WAKE_OP")


def wait(address: int, expected: int, timeout_s: float) -> bool:
    """Sleep while the word equals ``expected``, at most ``timeout_s``; False when the time ran out.

    True may be spurious (another value, a signal): look again.
    """
    seconds = int(timeout_s)
    limit = (ctypes.c_long * 2)(seconds, int((timeout_s - seconds) * 1e9))
    if _syscall(_SYS_FUTEX, address, _WAIT, expected, ctypes.addressof(limit), 0, 0) == 0:
        return True
    code = ctypes.get_errno()
    if code not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
        raise _failed("FUTEX_WAIT")
    return code != errno.ETIMEDOUT


def _failed(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {errno.errorcode.get(code, code)}")
