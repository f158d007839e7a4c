"""Work beside what serves has low priority, and nothing else has."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
from concertina.workers import background
from concertina.workers.background import NICENESS, REST_S, Throttle, in_background
from hypothesis import given
from hypothesis import strategies as st


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_background_work_has_low_priority_and_so_has_what_it_starts() -> None:
    before, seen = niceness(), []

    def work() -> str:
        seen.append(niceness())
        thread = threading.Thread(target=lambda: seen.append(niceness()))
        thread.start()
        thread.join()
        return "done"

    assert in_background(work) == "done"
    assert seen == [min(19, before + NICENESS)] * 2
    assert niceness() == before


def test_an_error_is_the_callers() -> None:
    with pytest.raises(KeyError, match="'x'"):
        in_background(lambda: {}["x"])


def test_what_failed_lets_go_of_everything_at_once() -> None:
    """A worker whose generation was abandoned while it joined must not keep pages mapped until garbage is collected."""

    class Held:
        pass

    refs: list[weakref.ref[Held]] = []

    def work() -> None:
        held = Held()
        refs.append(weakref.ref(held))
        raise KeyError("x")

    gc.disable()
    try:
        with pytest.raises(KeyError):
            in_background(work)
        assert refs[0]() is None
    finally:
        gc.enable()


def test_a_process_in_the_background_is_so_as_a_whole() -> None:
    """Also threads that are there already; in a process of its own, because there is no way back."""
    program = """
import os, threading
from concertina.workers.background import NICENESS, stay_in_background
before, end = os.getpriority(os.PRIO_PROCESS, 0), threading.Event()
threading.Thread(target=end.wait).start()
stay_in_background()
threading.Thread(target=end.wait).start()
seen = {os.getpriority(os.PRIO_PROCESS, int(t)) for t in os.listdir("/proc/self/task")}
end.set()
assert seen == {min(19, before + NICENESS)}, (before, seen)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@given(st.lists(st.integers(0, 2000), max_size=30), st.sampled_from([(0, 33), (300, 33), (640, 40), (10**6, 1311)]))
def test_throttled_work_rests_after_a_part_of_a_step(pieces: list[int], step_least: tuple[int, int]) -> None:
    """And never before; a step's part is bounded. The clock's unit is 2^-17 s, so that sums are exact."""
    (step, least), now, rests = step_least, 0, list[float]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background, "time", SimpleNamespace(thread_time=lambda: now * 2**-17, sleep=rests.append))
        throttle, unrested = Throttle(step * 2**-17), 0
        for piece in pieces:
            now, unrested, before = now + piece, unrested + piece, len(rests)
            throttle()
            assert (len(rests) > before) == (unrested >= least), (pieces, unrested)
            if unrested >= least:
                unrested = 0
    assert set(rests) <= {REST_S}
