"""Work beside what serves: it may use what cores are free, and little of those that are not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
NICENESS = 10
"""Added to a thread's own. The scheduler gives it about a tenth of a core that an ordinary thread wants too."""
WORK_S = (0.25e-3, 10e-3)
"""Processor time between two rests: the shortest and the longest."""
REST_S = 1e-3


def in_background(work: Callable[[], T]) -> T:
    """What ``work()`` returns or raises, done in a thread of low priority that ends with it.

    On Linux niceness is a thread's own, and one that was lowered cannot be raised again without a privilege: hence the
    thread. Threads that ``work`` starts are as low. Not for work that holds the interpreter or a lock for long where
    something urgent runs in the same process: that would wait for it.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _lower(threading.get_native_id())
            results.append(work())
        except BaseException as e:  # noqa: BLE001 - raised below, in the thread that asked
            errors.append(e)

    thread = threading.Thread(target=run, name="background", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors.pop()  # a list that still had it would be in its traceback: what that names would stay for long
    return results[0]


def stay_in_background() -> None:
    """Give all threads of this process, and those that they will start, low priority for good."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has just ended
            _lower(int(thread))


class Throttle:
    """Short rests of a thread beside a model in the same process that must not be held up.

    The interpreter runs one thread at a time, and a model gives it up at every operator: whoever computes in Python
    meanwhile holds it up for as long as that takes. In pieces with rests between them that is a little of many steps,
    and not all of one.

    Parameters
    ----------
    step_s : float
        How long a step of the model takes: it works for a sixteenth of that between two rests, within `WORK_S`, since
        a model that has just been idle seems slow.
    """

    def __init__(self, step_s: float) -> None:
        shortest_s, longest_s = WORK_S
        self._work_s = min(max(shortest_s, step_s / 16), longest_s)
        self._since_s = time.thread_time()

    def __call__(self) -> None:
        """Rest if it is time to. Always from the same thread."""
        if time.thread_time() - self._since_s >= self._work_s:
            time.sleep(REST_S)
            self._since_s = time.thread_time()


def unthrottled() -> None:
    """For work beside which nothing runs."""


def _lower(thread: int) -> None:
    os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS))
