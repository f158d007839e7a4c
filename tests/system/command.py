"""``concertina`` as a process with a Ray of its own, and what must be gone after it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from concertina.orchestrator.demo import free_port
from concertina.orchestrator.tokens import token_file

START_S = 180.0
GONE_S = 60.0


def concertina(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [sys.executable, "-m", "concertina", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_S, check=False)


def wait_for(done: Callable[[], bool], what: Callable[[], str], limit_s: float = GONE_S) -> None:
    """Return once it is so; fail with ``what`` says if that takes too long."""
    end_s = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end_s, what()
        time.sleep(0.2)


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


@dataclass(frozen=True)
class Process:
    """A process, told from a later one with its number by its start."""

    pid: int
    parent: int
    state: str
    started: int
    name: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
            name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return None
        fields = text.rpartition(")")[2].split()
        return cls(pid, int(fields[1]), fields[0], int(fields[19]), name[:80])

    @property
    def runs(self) -> bool:
        now = Process.of(self.pid)
        return now is not None and now.started == self.started and now.state not in "ZX"


def all_processes() -> list[Process]:
    found = (Process.of(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [process for process in found if process is not None]


def descendants(pid: int) -> list[Process]:
    """The process and everything below it."""
    everyone, found = all_processes(), {pid}
    while more := {p.pid for p in everyone if p.parent in found} - found:
        found |= more
    return [p for p in everyone if p.pid in found]


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def sockets(name: str) -> set[str]:
    """Abstract Unix sockets of a deployment's memory owners."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return {line.rpartition(" ")[2] for line in lines if f"@concertina/{name}/" in line}


@dataclass(frozen=True)
class Traces:
    """What a running deployment has made on this machine."""

    name: str
    processes: list[Process]
    memory_before: set[str]

    def left(self) -> list[str]:
        left = [f"{p.pid} {p.name}" for p in self.processes if p.runs]
        return [*left, *(shared_memory() - self.memory_before), *sockets(self.name)]


@dataclass(frozen=True)
class Server:
    """A ``concertina serve`` and where its Ray keeps its files, apart from every other Ray of this machine."""

    process: subprocess.Popen[bytes]
    directory: Path
    name: str
    url: str
    memory_before: set[str]

    @classmethod
    @contextmanager
    def start(cls, checkpoint: Path, *options: str, address: str = "local") -> Iterator[Server]:
        # Ray's Unix sockets lie below, and their paths may have 107 characters at most.
        directory = Path(tempfile.mkdtemp(prefix="ct-", dir="/tmp"))
        port = free_port()
        name = f"test-{port}"
        command = [sys.executable, "-m", "concertina", "serve", str(checkpoint), "--address", address]
        command += ["--port", str(port), "--name", name, *options]
        memory = shared_memory()
        with (directory / "stderr").open("wb") as stderr:
            process = subprocess.Popen(command, env={**os.environ, **_env(directory)}, stderr=stderr)
        server = cls(process, directory, name, f"http://127.0.0.1:{port}", memory)
        try:
            yield server
        finally:
            server.end()

    @property
    def env(self) -> dict[str, str]:
        """What makes another command find this server's Ray, also where there are others."""
        return {**_env(self.directory), **self._address()}

    def _address(self) -> dict[str, str]:
        for process in descendants(self.process.pid):
            command = Path(f"/proc/{process.pid}/cmdline").read_text()
            if match := re.search(r"--gcs-address=([^\0 ]+)", command):
                # Whoever names an address has to name this too; an embedded Ray asks for a token.
                return {"RAY_ADDRESS": match[1], "RAY_AUTH_MODE": "token"}
        return {}

    @property
    def stderr(self) -> str:
        return (self.directory / "stderr").read_text()

    def logs(self) -> Iterator[str]:
        """What each of its Ray's processes has written."""
        for path in self.directory.rglob("logs/worker-*.err"):
            yield path.read_text(errors="replace")

    def wait_until_healthy(self) -> None:
        def ended_or_healthy() -> bool:
            return self.process.poll() is not None or healthy(self.url)

        wait_for(ended_or_healthy, lambda: f"not healthy: {self.stderr}", START_S)
        assert self.process.poll() is None, self.stderr

    def traces(self) -> Traces:
        return Traces(self.name, descendants(self.process.pid), self.memory_before)

    def end(self) -> None:
        """Stop it if it still runs, and remove Ray's files."""
        below = descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(GONE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in below:
            if process.pid != self.process.pid and process.runs:
                os.kill(process.pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)
        token_file(self.name).unlink(missing_ok=True)  # one that was killed has left it


def _env(directory: Path) -> dict[str, str]:
    return {"RAY_TMPDIR": str(directory), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
