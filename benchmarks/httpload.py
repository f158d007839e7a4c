"""Load on an OpenAI-compatible endpoint, and servers as processes: start, first token, CPU seconds, end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .peers.harness import NEW_TOKENS, prompts

_TICKS = os.sysconf("SC_CLK_TCK")
_READY_S = 300.0
_END_S = 30.0


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens, and the name its model has there."""

    port: int
    model: str


async def stream(endpoint: Endpoint, prompt: Sequence[int], tokens: int = NEW_TOKENS) -> list[float]:
    """Times (`time.perf_counter`) at which pieces of one streamed completion came.

    Read straight from the socket: a client library would cost more CPU than some of the servers.

    Raises
    ------
    OSError
        Nobody listens, or the server hung up.
    RuntimeError
        It answered with an error, or with another number of tokens than asked for.
    """
    body = {
        "model": endpoint.model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
    try:
        writer.write(_post(json.dumps(body).encode()))
        return await _pieces(reader, tokens)
    finally:
        writer.close()


def _post(body: bytes) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return (head + "Content-Type: application/json\r\nConnection: close\r\n\r\n").encode() + body


async def _pieces(reader: asyncio.StreamReader, tokens: int) -> list[float]:
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"expected 200, got {status!r} {await reader.read()!r}")
    times_s: list[float] = []
    async for line in reader:
        if line.startswith(b'data: {"'):
            event = json.loads(line[6:])
            if event.get("choices"):
                times_s.append(time.perf_counter())
            elif event.get("usage"):
                _check(event["usage"], tokens)
        elif line.startswith(b"data: [DONE]"):
            return times_s
    raise ConnectionError("the server hung up in the middle of a stream")


def _check(usage: Mapping[str, int], tokens: int) -> None:
    if usage["completion_tokens"] != tokens:
        raise RuntimeError(f"expected {tokens} tokens, got {usage}")


async def generate(endpoint: Endpoint, asked: Sequence[Sequence[int]]) -> list[list[float]]:
    """All prompts at once; times of the pieces of each answer."""
    return list(await asyncio.gather(*(stream(endpoint, prompt) for prompt in asked)))


@contextmanager
def server(command: Sequence[str], env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server process in a session of its own; ended, with whatever it has started, on the way out."""
    with subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            family = [process.pid, *descendants(process.pid)]
            process.send_signal(signal.SIGINT)
            _wait(process)
            for pid in family:
                if pid in _parents():
                    os.kill(pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()


def first_token_s(
    endpoint: Endpoint, process: subprocess.Popen[bytes], began_s: float, prompt: Sequence[int] = ()
) -> float:
    """Seconds from ``began_s`` to the end of an answer of one token, asking again until the server is up.

    Not to the first piece of a longer one: tokens of a model with random weights may make no text before its end.
    """
    prompt = prompt or prompts(1, -2)[0]
    while time.perf_counter() - began_s < _READY_S:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            return asyncio.run(stream(endpoint, prompt, 1))[0] - began_s
        except (OSError, RuntimeError):  # not listening yet, or listening without a worker
            time.sleep(0.1)
    raise RuntimeError(f"no answer within {_READY_S} s")


def family_cpu_s(pid: int) -> float:
    """CPU seconds of a process and everything that it has started and that is still there."""
    return sum(_cpu_s(p) for p in (pid, *descendants(pid)))


def descendants(pid: int) -> list[int]:
    """Living children, their children, and so on."""
    parents = _parents()
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def _parents() -> dict[int, int]:
    """Parent of each process that lives and is no zombie (proc(5))."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) and fields[0] != "Z":
            parents[int(entry.name)] = int(fields[1])
    return parents


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none if the process has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _cpu_s(pid: int) -> float:
    fields = _stat(pid)
    return sum(map(int, fields[11:15])) / _TICKS if fields else 0.0  # with children that were waited for
