"""Groups of exchange members for tests: threads of this process, or processes that many tests share."""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from concertina.workers.exchange.base import Exchange
from concertina.workers.exchange.layout import region_bytes
from concertina.workers.exchange.liveness import MemberLocks
from concertina.workers.exchange.shared import SharedMemoryExchange

ANSWER_S = 120.0
ROOT = Path(__file__).parents[2]


class Region:
    """A fresh memfd for one shared-memory exchange."""

    def __init__(self, size: int, capacity: int) -> None:
        self.fd = os.memfd_create("exchange-test")
        os.ftruncate(self.fd, region_bytes(size, capacity))
        self.size, self.capacity = size, capacity

    def member(self, rank: int, timeout_s: float = 10.0) -> SharedMemoryExchange:
        region = mmap.mmap(self.fd, 0)
        return SharedMemoryExchange(
            region, rank, self.size, self.capacity, timeout_s, MemberLocks(self.fd, 0)
        )  # fmt: skip

    def close(self) -> None:
        os.close(self.fd)


def run_threads(size: int, capacity: int, work: Callable[[Exchange], Any], timeout_s: float = 10.0) -> list[Any]:
    """Results of ``work`` by rank, each in a thread with its own member of one exchange; raises the first error."""
    region = Region(size, capacity)
    members = [region.member(r, timeout_s) for r in range(size)]
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(members[rank])
        except BaseException as e:  # noqa: BLE001 - raised below, in the test's own thread
            errors.append(e)
            members[rank].close()

    threads = [threading.Thread(target=run, args=(r,)) for r in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for m in members:
        m.close()
    region.close()
    if errors:
        raise errors[0]
    return results


class Process:
    """One member process (tests.exchange.member)."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.exchange.member"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._buffer = b""

    def send(self, do: str, args: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, "args": args}).encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        """The next answer; fails if the process ended or is late."""
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_S)
            assert ready, f"no answer for {ANSWER_S} s"
            chunk = self._process.stdout.read(65536)
            assert chunk, f"the member process ended with {self._process.wait()}"
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Crew:
    """Processes that live as long as the test session, since each costs seconds of importing torch."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._attempt = 0
        self._region: Region | None = None
        self._idle: list[Process] = []
        self.members: list[Process] = []

    def join(self, kind: str, size: int, timeout_s: float = 30.0, capacity: int = 1 << 16) -> None:
        """Form a fresh exchange among ``size`` processes."""
        fresh = [Process() for _ in range(size - len(self._idle))]
        for p in fresh:
            assert p.answer() == {"ok": "ready"}
        self._idle += fresh
        self.members, self._idle = self._idle[:size], self._idle[size:]
        self._attempt += 1
        where: dict[str, Any] = {"port": self._port, "prefix": f"attempt{self._attempt}"}
        if kind == "shared":
            self._region = Region(size, capacity)
            path = f"/proc/{os.getpid()}/fd/{self._region.fd}"
            where = {"path": path, "capacity": capacity, "base": self._attempt * 100}
        for rank, p in enumerate(self.members):
            p.send("join", {"kind": kind, "rank": rank, "size": size, "timeout_s": timeout_s, "where": where})
        self.answers()

    def start(self, scenario: str, **args: Any) -> None:
        for p in self.members:
            p.send(scenario, args)

    def answers(self, ranks: list[int] | None = None) -> list[Any]:
        """Results by rank (of ``ranks``); an error of a member fails the test."""
        answers = [self.members[r].answer() for r in (range(len(self.members)) if ranks is None else ranks)]
        for a in answers:
            assert "ok" in a, a["error"]
        return [a["ok"] for a in answers]

    def run(self, scenario: str, **args: Any) -> list[Any]:
        self.start(scenario, **args)
        return self.answers()

    def lose(self, rank: int) -> None:
        """End a member for good, however it is."""
        self.members.pop(rank).end()

    def leave(self) -> None:
        for p in self.members:
            p.send("leave", {})
        self.answers()
        self._idle += self.members
        self.members = []
        if self._region is not None:
            self._region.close()
            self._region = None

    def end(self) -> None:
        for p in [*self.members, *self._idle]:
            p.end()
        self.members, self._idle = [], []
