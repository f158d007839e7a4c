"""Memory of the processes of every deployment under one Ray, sampled from beside them.

``python -m benchmarks.elasticity_memory PID`` prints ``monotonic-seconds process-bytes pool-bytes`` every 50 ms for
owners, workers (also those that stand by) and controllers below process PID. Process bytes are anonymous memory
(``RssAnon``); pool bytes are the blocks of memory files (memfd) that they have open, each counted once however many
map it. File pages (libraries, the checkpoint in the page cache) are not counted: the kernel takes them back. Both are
counters that the kernel keeps, so that a sample costs about a millisecond and walks no page table, as PSS would.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .httpload import descendants

PERIOD_S = 0.05
LOOK_S = 0.25  # between two looks for processes and memory files
_KINDS = ("ray::OwnerActor", "ray::WorkerActor", "ray::ControllerService")


@dataclass(frozen=True)
class Sample:
    """Memory at one moment (monotonic clock)."""

    at_s: float
    process_bytes: int
    pool_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.process_bytes + self.pool_bytes


class Sampler:
    """The samples so far, from a file that the other process writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._samples: list[Sample] = []

    def between(self, begin_s: float, end_s: float) -> list[Sample]:
        """Reads only what is new: clients share this thread, and would seem slow."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        for line in whole.splitlines():
            at, own, pools = line.split()
            self._samples.append(Sample(float(at), int(own), int(pools)))
        self._read += len(whole) + bool(whole)
        first = bisect_left(self._samples, begin_s, key=_at_s)
        return self._samples[first : bisect_right(self._samples, end_s, key=_at_s)]


def _at_s(sample: Sample) -> float:
    return sample.at_s


@contextmanager
def sampling(folder: Path) -> Iterator[Sampler]:
    """Sample what runs below this process, into a file of ``folder``."""
    path = folder / "memory"
    command = [sys.executable, "-m", "benchmarks.elasticity_memory", str(os.getpid())]
    with path.open("wb") as out, subprocess.Popen(command, stdout=out) as process:
        try:
            yield Sampler(path)
        finally:
            process.kill()


def actors(root: int, kinds: Sequence[str] = _KINDS) -> list[int]:
    """Processes below ``root`` that are actors of such kinds."""
    return [pid for pid in descendants(root) if _title(pid).startswith(tuple(kinds))]


def _title(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""  # it has ended


def _memory_files(pids: Sequence[int]) -> dict[tuple[int, int], str]:
    """A way to each memory file that one of the processes has open, by device and inode."""
    found: dict[tuple[int, int], str] = {}
    for pid in pids:
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    if os.readlink(entry.path).startswith("/memfd:"):
                        status = os.stat(entry.path)
                        found.setdefault((status.st_dev, status.st_ino), entry.path)
    return found


def _anonymous_bytes(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


def _file_bytes(identity: tuple[int, int], path: str) -> int:
    with suppress(OSError):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) == identity:
            return status.st_blocks * 512
    return 0  # whoever had it open has ended; another way is found at the next look


def main(root: int) -> None:
    os.nice(19)  # it shall not be felt
    looked_s = 0.0
    pids: list[int] = []
    files: dict[tuple[int, int], str] = {}
    while True:
        now_s = time.monotonic()
        if now_s - looked_s > LOOK_S:
            looked_s, pids = now_s, actors(root)
            files = _memory_files(pids)
        own, pools = sum(map(_anonymous_bytes, pids)), sum(_file_bytes(*file) for file in files.items())
        print(f"{now_s:.3f} {own} {pools}", flush=True)
        time.sleep(max(0.0, now_s + PERIOD_S - time.monotonic()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
