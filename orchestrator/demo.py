"""``make demo``: train a small model on real sources, serve it from two workers, stream completions, show the status.

Every step is a command that a user would type; the demo only runs them one after the other.
"""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import OperatorError

CHECKPOINT = Path(".demo/checkpoint")
NAME = "concertina-demo"  # else the token of a deployment that runs here would be replaced
WORKERS = 2
MAX_TOKENS = 160
_PORTS = range(20_000, 32_000)
PROMPTS = (
    'def read_lines(path):\n    """Return the lines of a file."""\n    ',
    "import os\nimport sys\n\n\nclass Parser:\n    def __init__(self, ",
    "for name in sorted(os.listdir(directory)):\n    ",
)


@dataclass(frozen=True, slots=True)
class Streamed:
    """One streamed completion: its tokens, seconds to the first and to the last."""

    tokens: int
    first_s: float
    total_s: float


def run(*arguments: str) -> None:
    """Run ``concertina`` with these arguments, in sight of the user."""
    done = subprocess.run([sys.executable, "-m", "concertina", *arguments], check=False)
    if done.returncode:
        raise OperatorError(f"concertina {' '.join(arguments)} ended with status {done.returncode}")


def free_port() -> int:
    """A TCP port on loopback that nobody listens on, and that no process is given unless it asks for just that one.

    Ray's processes take many of those that the system gives out (Linux: from 32768) or that Ray does (to 19999): one
    that was free a moment ago may be theirs when a server comes to listen.
    """
    for port in random.sample(_PORTS, len(_PORTS)):
        with closing(socket.socket()) as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise OperatorError(f"port: all from {_PORTS[0]} to {_PORTS[-1]} are in use")


@contextmanager
def serving(checkpoint: Path, port: int) -> Iterator[float]:
    """A ``concertina serve`` beside this process; yields the seconds that it took to open its endpoint."""
    command = [sys.executable, "-m", "concertina", "serve", str(checkpoint), "--address", "local", "--name", NAME]
    begin = time.monotonic()
    server = subprocess.Popen(
        [*command, "--workers", str(WORKERS), "--port", str(port)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        announced = server.stdout.readline()
        if not announced.startswith("serving"):
            raise OperatorError(f"concertina serve ended with status {server.wait()}")
        print(announced, end="")
        yield time.monotonic() - begin
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate()


def stream(port: int, model: str, prompt: str) -> Streamed:
    """Print a prompt and its completion as it arrives."""
    body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0.5, "seed": 7, "stream": True}
    body["stream_options"] = {"include_usage": True}
    first, tokens, begin = 0.0, 0, time.monotonic()
    for event in events(port, body):
        for choice in event["choices"]:
            first = first or time.monotonic() - begin
            sys.stdout.write(choice["text"])
            sys.stdout.flush()
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    return Streamed(tokens, first, time.monotonic() - begin)


def events(port: int, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The server-sent events of a streamed completion."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise OperatorError(f"the endpoint answered {response.status}: {response.read().decode()}")
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def summary(console: Console, checkpoint: Path, ready_s: float, streamed: list[Streamed]) -> None:
    """What was made and how fast it ran."""
    table = Table(title="Demo summary", show_header=False, title_justify="left")
    table.add_row("checkpoint", f"{checkpoint} (Hugging Face layout)")
    for name, value in training_rows(checkpoint):
        table.add_row(name, value)
    table.add_row("serve: start to healthy endpoint", f"{ready_s:.1f} s, {WORKERS} workers")
    tokens, seconds = sum(s.tokens for s in streamed), sum(s.total_s for s in streamed)
    table.add_row("serve: first token", f"{min(s.first_s for s in streamed) * 1e3:.0f} ms at best")
    table.add_row("serve: one stream", f"{tokens / seconds:.0f} tokens/s over {tokens} tokens")
    console.print(table)
    console.print(f"Serve it yourself:  .venv/bin/concertina serve {checkpoint} --workers {WORKERS}")


def training_rows(checkpoint: Path) -> list[tuple[str, str]]:
    """Held-out quality as the training run recorded it."""
    record = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))["summary"]
    return [
        ("held-out text, bits per byte", f"{record['held_out_bits']:.3f}"),
        ("  gzip -9 / xz -9e on the same text", f"{record['gzip_bits']:.3f} / {record['xz_bits']:.3f}"),
    ]


def main() -> None:
    """Run the demo from the repository's root."""
    console = Console()
    if (CHECKPOINT / "model.safetensors").exists():
        console.print(f"[bold]1. Train[/]: reusing {CHECKPOINT} (make clean removes it)")
    else:
        console.print("[bold]1. Train[/] a byte-level OLMoE on Python's own standard library")
        run("train", str(CHECKPOINT))
    console.print(f"[bold]2. Serve[/] it from {WORKERS} workers")
    port = free_port()
    with serving(CHECKPOINT, port) as ready_s:
        console.print("[bold]3. Complete[/] code")
        streamed = []
        for prompt in PROMPTS:
            console.print(prompt, style="cyan", end="", markup=False, highlight=False)
            streamed.append(stream(port, CHECKPOINT.name, prompt))
            console.print("\n")
        console.print("[bold]4. Status[/] (concertina status)")
        run("status", "--once", "--name", NAME)
    summary(console, CHECKPOINT, ready_s, streamed)


if __name__ == "__main__":
    main()
