"""Who works on the engine: its loop, or a caller while no loop runs; never two at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...errors import InternalError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Call:
    fn: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        try:
            self.done.set_result(self.fn())
        except BaseException as e:  # noqa: BLE001 - it is the caller's, who waits for it
            self.done.set_exception(e)


class Turns:
    """Lets a loop run alone, and others have something done at the loop's next boundary."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: int | None = None  # a thread
        self._looping = False
        self._calls: list[_Call] = []

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Be the loop; calls that come meanwhile have been served when this ends.

        Raises
        ------
        InternalError
            There is a loop already, or this is called from within a call.
        """
        with self._changed:
            if self._holder == threading.get_ident():
                raise InternalError("the engine's loop cannot run within a call")
            self._changed.wait_for(self._loop_or_nobody)
            if self._looping:
                raise InternalError("the engine's loop is running already")
            self._holder, self._looping = threading.get_ident(), True
        try:
            yield
        finally:
            self._end_loop()

    def serve(self) -> None:
        """In the loop, at a boundary: do what was asked for."""
        for call in self._pending():
            call.run()

    def call(self, fn: Callable[[], T], wake: Callable[[], None]) -> T:
        """Run ``fn`` in the loop at its next boundary, or here if no loop runs (or this is it); its result.

        Parameters
        ----------
        fn : callable
            What it raises is raised here.
        wake : callable
            Called so that a sleeping loop comes to its boundary.
        """
        if self._holder == threading.get_ident():
            return fn()
        call = _Call(fn)
        with self._changed:
            self._changed.wait_for(self._loop_or_nobody)
            looping = self._looping
            if looping:
                self._calls.append(call)
            else:
                self._holder = threading.get_ident()
        if looping:
            wake()
        else:
            call.run()
            self._leave()
        result: T = call.done.result()
        return result

    def _loop_or_nobody(self) -> bool:
        return self._looping or self._holder is None

    def _pending(self) -> list[_Call]:
        with self._changed:
            calls, self._calls = self._calls, []
            return calls

    def _end_loop(self) -> None:
        while True:
            self.serve()
            with self._changed:
                if not self._calls:
                    self._looping, self._holder = False, None
                    self._changed.notify_all()
                    return

    def _leave(self) -> None:
        with self._changed:
            self._holder = None
            self._changed.notify_all()
