"""The few Linux calls that Python does not offer: fixed mappings, page advice, hole punching.

Numbers are those of Linux's ``asm-generic/mman-common.h`` and ``linux/falloc.h`` (x86-64 and arm64 agree).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from ...errors import OperatorError

MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
PROT_NONE = 0
MADV_POPULATE_READ = 22
MADV_COLLAPSE = 25
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_fixed(address: int, nbytes: int, fd: int, offset: int, *, writable: bool) -> None:
    """Replace what is mapped at ``address`` by ``nbytes`` of ``fd`` from ``offset``, shared.

    Raises
    ------
    OperatorError
        The process has too many mappings (``vm.max_map_count``).
    OSError
        Any other refusal of the kernel.
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    _mmap(address, nbytes, protection, mmap.MAP_SHARED | MAP_FIXED, fd, offset)


def unmap_fixed(address: int, nbytes: int) -> None:
    """Turn addresses back into a reservation that faults when touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
    _mmap(address, nbytes, PROT_NONE, flags, -1, 0)


def _mmap(address: int, nbytes: int, protection: int, flags: int, fd: int, offset: int) -> None:
    if _libc.mmap(address, nbytes, protection, flags, fd, offset) == _MAP_FAILED:
        code = ctypes.get_errno()
        if code == errno.ENOMEM:
            raise OperatorError(
                f"mapping {nbytes} bytes: no memory or too many mappings in this process; "
                "raise the sysctl vm.max_map_count or use larger pages"
            )
        raise OSError(code, f"mmap of {nbytes} bytes at offset {offset}: {os.strerror(code)}")


def populate(address: int, nbytes: int) -> bool:
    """Enter pages that are in memory into this process' page table now, not at the first touch; False if refused.

    Touching them does the same later: a kernel that does not know this advice (before Linux 5.14) loses nothing else.
    """
    return bool(_libc.madvise(address, nbytes, MADV_POPULATE_READ) == 0)


def collapse(address: int, nbytes: int) -> bool:
    """Back addresses by huge pages now; False where the kernel has none to give.

    Needs Linux 6.1; works where transparent huge pages are switched off for shared memory.
    """
    if _libc.madvise(address, nbytes, MADV_COLLAPSE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.EAGAIN, errno.ENOMEM, errno.EBUSY):
        return False
    raise OSError(code, f"madvise(MADV_COLLAPSE) of {nbytes} bytes: {os.strerror(code)}")


def punch_hole(fd: int, offset: int, nbytes: int) -> None:
    """Give physical memory of a file back; the hole reads as zeros."""
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, nbytes):
        code = ctypes.get_errno()
        raise OSError(code, f"fallocate hole of {nbytes} bytes at offset {offset}: {os.strerror(code)}")
