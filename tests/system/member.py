"""A process of the crew: holds one real `Worker` at a time and does as it is told through a pipe.

``python -m tests.system.member DESCRIPTOR``; run from the repository's root.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

from concertina.errors import ConcertinaError
from concertina.workers.worker import Worker


def main() -> None:
    pipe: Connection = Connection(int(sys.argv[1]))
    worker: Worker | None = None
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:  # the test's process has ended
            return
        try:
            if name == "hire":
                worker, answer = Worker(*args), None
            else:
                answer = getattr(worker, name)(*args)
        except ConcertinaError as e:
            answer = e
        pipe.send(answer)


if __name__ == "__main__":
    main()
