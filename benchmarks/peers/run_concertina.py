"""Concertina's engines through their own door, `WorkerClient`. See `harness`.

``PYTHON run_concertina.py CHECKPOINT THREADS WORKERS``: a whole deployment without the HTTP endpoint, on a Ray of its
own. CPU seconds are those of the workers and of this client.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import NEW_TOKENS, Answers, process_cpu_s  # type: ignore[import-not-found]

_TICKS = os.sysconf("SC_CLK_TCK")


def other_cpu_s(pid: int) -> float:
    """CPU seconds of another process (proc(5), fields utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@contextmanager
def deployment(checkpoint: str, threads: int, workers: int) -> Iterator[tuple[Any, Any]]:
    """A running deployment: its configuration and its controller."""
    import ray
    from concertina.orchestrator import remote
    from concertina.orchestrator.config import DeploymentConfig, EngineOptions
    from concertina.orchestrator.controller_actor import launch

    engine = EngineOptions(max_model_len=1024, prefix_caching=False, threads=threads)
    config = DeploymentConfig(checkpoint, workers=workers, engine=engine, rebalance_s=0, standbys=0)
    remote.join_or_start(remote.LOCAL, workers, verbose=False)
    try:
        controller = launch(config)
        ray.get(controller.start.remote())
        yield config, controller
        ray.get(controller.stop.remote())
    finally:
        ray.shutdown()


class Load:
    """Requests spread evenly over the workers."""

    def __init__(self, clients: Sequence[Any]) -> None:
        self._clients = clients
        self._ids = itertools.count()

    async def generate(self, prompts: list[list[int]]) -> list[list[float]]:
        spread = zip(prompts, itertools.cycle(self._clients))
        return await asyncio.gather(*(self._one(client, prompt) for prompt, client in spread))

    async def _one(self, client: Any, prompt: list[int]) -> list[float]:
        from concertina.workers.protocol import EngineRequest, SamplingParams

        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        times_s: list[float] = []
        async for output in client.submit(EngineRequest(str(next(self._ids)), tuple(prompt), sampling)):
            times_s += [time.perf_counter()] * len(output.token_ids)
        return times_s


def main() -> None:
    answers = Answers()
    import ray
    from concertina.workers.client import WorkerClient

    with (
        deployment(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])) as (config, controller),
        asyncio.Runner() as runner,
    ):
        members = ray.get(controller.members.remote())
        pids = [w.pid for w in ray.get(controller.status.remote()).workers]
        clients = [runner.run(WorkerClient.connect(m.host, m.port, config.token)) for m in members.workers]
        load = Load(clients)
        answers.serve(
            lambda prompts: runner.run(load.generate(prompts)),
            lambda: process_cpu_s() + sum(map(other_cpu_s, pids)),
        )
        for client in clients:
            runner.run(client.close())


if __name__ == "__main__":
    main()
