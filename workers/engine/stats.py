"""What an engine has done so far, for metrics."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace

STEP_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine began.

    ``prompt_tokens`` counts each computed prompt once, ``cached_tokens`` those of them that the prefix cache had.
    ``step_counts[i]`` is the number of steps with a forward pass that took at most ``STEP_BOUNDS_S[i]`` seconds
    and more than the bound before; the last one counts all longer ones.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    ended: int = 0
    preemptions: int = 0
    step_seconds: float = 0.0
    step_counts: list[int] = field(default_factory=lambda: [0] * (len(STEP_BOUNDS_S) + 1))

    def count_step(self, seconds: float) -> None:
        self.steps += 1
        self.step_seconds += seconds
        self.step_counts[bisect_left(STEP_BOUNDS_S, seconds)] += 1

    def snapshot(self) -> EngineStats:
        return replace(self, step_counts=list(self.step_counts))
