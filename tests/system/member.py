"""A process of the crew: holds one real `Worker` at a time and does as it is told through a pipe.

``python -m tests.system.member DESCRIPTOR``; run from the repository's root. Calls run side by side, as an actor's do.
"""

from __future__ import annotations

import sys
import threading
from multiprocessing.connection import Connection

from concertina.errors import ConcertinaError, InternalError
from concertina.workers.worker import Worker

_TELLING = ("prepare", "abandon", "commit", "park")  # as `WorkerService` answers these
_PARK_S = 0.5


class Desk:
    """Takes calls and sends their answers, each with the call's number."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._worker: Worker | None = None

    def serve(self) -> None:
        while True:
            try:
                number, name, args = self._pipe.recv()
            except EOFError:  # the test's process has ended
                return
            if name == "hire":
                self._worker = Worker(*args)
                self._send(number, None)
            else:
                threading.Thread(target=self._call, args=(self._worker, number, name, args), daemon=True).start()

    def _call(self, worker: Worker | None, number: int, name: str, args: tuple[object, ...]) -> None:
        try:
            answer = getattr(worker, name)(*args, *((_PARK_S,) if name == "park" else ()))
            if worker is not None and name in _TELLING:
                answer = worker.report()
        except ConcertinaError as e:
            # Not kept in a variable: its traceback has this frame, and those of a worker that hold what it maps.
            self._send(number, e)
            return
        except Exception as e:  # noqa: BLE001 - a test's mistake: without an answer it would wait for ever
            self._send(number, InternalError(f"{type(e).__name__}: {e}"))
            return
        self._send(number, answer)

    def _send(self, number: int, answer: object) -> None:
        with self._lock:
            self._pipe.send((number, answer))


if __name__ == "__main__":
    Desk(Connection(int(sys.argv[1]))).serve()
