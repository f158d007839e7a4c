"""Stops one thread of another process, the one that computes, as a device's kernel that never ends would (ptrace).

As a program it says "frozen" of the process that it is told, or "forbidden", and ends with that process.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_SEIZE, _INTERRUPT = 0x4206, 0x4207  # sys/ptrace.h
_WALL = 0x40000000  # sys/wait.h: other threads than the first one, too
_FROZEN, _FORBIDDEN = "frozen", "forbidden"


@contextmanager
def frozen_engine(pid: int) -> Iterator[None]:
    """The thread of a process that uses most CPU now stands still, until the process ends."""
    with subprocess.Popen([sys.executable, __file__, str(pid)], stdout=subprocess.PIPE, text=True) as tracer:
        assert tracer.stdout is not None
        try:
            said = tracer.stdout.readline().strip()
            if said == _FORBIDDEN:
                pytest.skip("a thread of another process cannot be stopped here")
            assert said == _FROZEN
            yield
        finally:
            tracer.kill()


def _busiest(pid: int) -> int:
    before = _cpu(pid)
    time.sleep(0.5)
    after = _cpu(pid)
    return max(before.keys() & after, key=lambda thread: after[thread] - before[thread])


def _cpu(pid: int) -> dict[int, int]:
    """Ticks of every thread."""
    used = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # it has ended
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            used[int(task.name)] = int(fields[11]) + int(fields[12])
    return used


def _ptrace(request: int, thread: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.argtypes, call.restype = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_long
    if call(request, thread, None, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _main(pid: int) -> None:
    thread = _busiest(pid)
    try:
        _ptrace(_SEIZE, thread)
        _ptrace(_INTERRUPT, thread)
    except PermissionError:
        print(_FORBIDDEN, flush=True)
        return
    _, status = os.waitpid(thread, _WALL)
    print(_FROZEN, flush=True)
    while os.WIFSTOPPED(status):  # a thread that has ended waits for who traces it, and its process with it
        _, status = os.waitpid(thread, _WALL)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
