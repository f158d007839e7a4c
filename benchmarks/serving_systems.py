"""The systems that `serving` measures: how each is started, and how it is asked for one round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import httpload

_PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Options:
    """Where the peers' Pythons are (None: left out), and threads of each worker and of a peer on its own."""

    checkpoint: Path
    gguf: Path
    threads: int
    vllm_python: str | None
    llamacpp_python: str | None


@dataclass(frozen=True)
class System:
    """An engine on a number of cores. ``door``: ``engine``, or ``http`` for its OpenAI-compatible server."""

    name: str
    cores: int
    command: tuple[str, ...]
    door: str = "engine"
    port: int = 0

    @property
    def label(self) -> str:
        """Engine, cores and door, as they appear in the summary's keys."""
        return f"{self.name}_{self.cores}_cores" + ("_http" if self.door == "http" else "")


def engines(options: Options, both: bool) -> list[System]:
    """Every engine through its own door, peers on as many cores as one worker, and with ``both`` as two."""
    checkpoint, threads = str(options.checkpoint), options.threads
    systems = []
    for workers in (1, 2):
        cores = workers * threads
        systems.append(_runner("concertina", sys.executable, cores, checkpoint, threads, workers))
        if workers == 1 or both:
            systems.append(_runner("transformers", sys.executable, cores, checkpoint, cores))
            if options.vllm_python:
                systems.append(_runner("vllm", options.vllm_python, cores, checkpoint, cores))
            if options.llamacpp_python:
                systems.append(_runner("llamacpp", options.llamacpp_python, cores, options.gguf, cores))
    return systems


def _runner(name: str, python: str, cores: int, *arguments: object) -> System:
    return System(name, cores, (python, str(_PEERS / f"run_{name}.py"), *map(str, arguments)))


def servers(options: Options, port: int) -> list[System]:
    """Every HTTP server, for the cold start and the load through HTTP."""
    threads = options.threads
    ours = [_concertina_server(options, workers, port) for workers in (1, 2)]
    if options.vllm_python:
        ours.append(_vllm_server(options.vllm_python, options.checkpoint, threads, port))
    return ours


def _concertina_server(options: Options, workers: int, port: int) -> System:
    command = (sys.executable, "-m", "concertina", "serve", str(options.checkpoint))
    limits = ("--threads", str(options.threads), "--max-model-len", "1024", "--no-prefix-caching")
    where = ("--workers", str(workers), "--address", "local", "--port", str(port), "--served-model-name", "model")
    return System("concertina", workers * options.threads, (*command, *limits, *where), "http", port)


def _vllm_server(python: str, checkpoint: Path, threads: int, port: int) -> System:
    command = (python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint))
    limits = ("--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "64", "--enforce-eager")
    where = ("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model", "--no-enable-prefix-caching")
    return System("vllm", threads, (*command, *limits, *where), "http", port)


def environment(system: System, threads: int) -> dict[str, str]:
    """Threads as asked, nothing from the network; vLLM's CPU build unbound, since cores are shared."""
    inner = threads if system.name == "concertina" else system.cores
    return os.environ | {
        "OMP_NUM_THREADS": str(inner),
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


class Runner:
    """A runner process (see `peers.harness`) that has loaded its model."""

    def __init__(self, system: System, process: subprocess.Popen[str]) -> None:
        self.system = system
        self._process = process
        self._answer()

    def round(self, concurrency: int, seed: int) -> Mapping[str, Any]:
        """What one round took: ``wall_s``, ``cpu_s``, ``times_s`` per request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"concurrency": concurrency, "seed": seed}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Mapping[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.system.label}: its runner ended with {self._process.wait()}; see its log")
        answer: Mapping[str, Any] = json.loads(line)
        return answer


@contextmanager
def runner(system: System, threads: int, logs: Path) -> Iterator[Runner]:
    """Start a runner and wait until its model is loaded; closing its standard input ends it."""
    with (
        (logs / f"{system.label}.log").open("w") as log,
        subprocess.Popen(
            system.command,
            env=environment(system, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            yield Runner(system, process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                for pid in (*httpload.descendants(process.pid), process.pid):
                    os.kill(pid, 9)


def make_gguf(options: Options) -> None:
    """The checkpoint once more, as llama.cpp reads it."""
    if options.llamacpp_python and not options.gguf.exists():
        arguments: Sequence[str] = (str(_PEERS / "to_gguf.py"), str(options.checkpoint), str(options.gguf))
        subprocess.run([options.llamacpp_python, *arguments], check=True, stdout=subprocess.DEVNULL)
