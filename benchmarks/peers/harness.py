"""The common half of every runner: one process per engine, told over pipes what to run. Standard library only.

A runner is started as ``PYTHON benchmarks/peers/run_NAME.py CHECKPOINT THREADS [MORE]`` with the Python that has the
engine. It loads the model once, then answers each line ``{"concurrency": 8, "seed": 3}`` on its standard input with a
line of what it measured, so that engines can take turns. What engines print goes to standard error.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable

PROMPT_TOKENS = 64
NEW_TOKENS = 64
_FIRST_ID, _LAST_ID = 4, 1999  # ordinary tokens of the benchmark's checkpoint

# (prompts) -> per request the seconds (of time.perf_counter) at which each of its tokens was there
Generate = Callable[[list[list[int]]], list[list[float]]]


def prompts(concurrency: int, seed: int) -> list[list[int]]:
    """Random prompts, different for every seed and request, so that no prefix cache can help."""
    draw = random.Random(f"{concurrency}/{seed}")
    return [[draw.randint(_FIRST_ID, _LAST_ID) for _ in range(PROMPT_TOKENS)] for _ in range(concurrency)]


def process_cpu_s() -> float:
    """CPU seconds of this process, its threads and the children that it has waited for."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


class Answers:
    """Standard output, kept for answers: whatever is printed once this exists goes to standard error."""

    def __init__(self) -> None:
        self._pipe = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def serve(self, generate: Generate, cpu_s: Callable[[], float] = process_cpu_s) -> None:
        """Answer lines until standard input ends."""
        generate(prompts(2, -1))  # warm up
        self._say({"ready": True})
        for line in sys.stdin:
            case = json.loads(line)
            asked = prompts(case["concurrency"], case["seed"])
            cpu, began_s = cpu_s(), time.perf_counter()
            times_s = generate(asked)
            wall_s = time.perf_counter() - began_s
            since_s = [[t - began_s for t in row] for row in times_s]
            self._say({"wall_s": wall_s, "cpu_s": cpu_s() - cpu, "times_s": since_s})

    def _say(self, message: dict[str, object]) -> None:
        self._pipe.write(json.dumps(message) + "\n")
