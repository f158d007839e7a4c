"""What the times of tokens and the samples of memory say. Pure.

Arrivals are (monotonic seconds, client, tokens) in the order of time. Steps are, for every worker, the moments at
which one ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from .elasticity_memory import Sample

Arrival = tuple[float, int, int]
Steps = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Window:
    """From one moment to another, in monotonic seconds."""

    begin_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s

    def has(self, at_s: float) -> bool:
        return self.begin_s <= at_s <= self.end_s


def tokens_per_s(arrivals: Iterable[Arrival], window: Window) -> float:
    return sum(tokens for at_s, _, tokens in arrivals if window.has(at_s)) / max(window.seconds, 1e-9)


def spread_tokens_per_s(arrivals: Iterable[Arrival], window: Window) -> float:
    """For a window of few steps, whose edges would decide how many arrivals it has.

    Tokens count by how much of the time since their client's ones before lies within.
    """
    last_s: dict[int, float] = {}
    inside = 0.0
    for at_s, client, tokens in arrivals:
        since_s = last_s.get(client, at_s)
        last_s[client] = at_s
        if since_s < at_s:
            within_s = min(at_s, window.end_s) - max(since_s, window.begin_s)
            inside += tokens * max(0.0, within_s) / (at_s - since_s)
        elif window.has(at_s):
            inside += tokens
    return inside / max(window.seconds, 1e-9)


def median_token_s(arrivals: Iterable[Arrival], window: Window) -> float:
    """Median time between two tokens of one client."""
    return median_step_s(list(by_client(arrivals).values()), window)


def median_step_s(steps: Steps, window: Window) -> float:
    """Median time from the end of a worker's step to that of its next one."""
    return median(b - a for ends_s in steps for a, b in pairwise(ends_s) if window.has(b))


@dataclass(frozen=True)
class Pause:
    """The time in which no worker ended a step that lies most steps above a step's own time.

    Parameters
    ----------
    seconds : float
        Beyond the median step.
    steps : float
        The same in median steps.
    at_s : float
        When it began.
    """

    seconds: float
    steps: float
    at_s: float


def pause(steps: Steps, window: Window, step_s: float, later_step_s: float, change_s: float) -> Pause:
    """The longest pause that ends in the window.

    A step takes ``step_s`` before ``change_s`` and ``later_step_s`` from then on: another number of workers has another
    one. A gap over that moment is held against the longer of them.
    """
    ends_s = sorted(end_s for own in steps for end_s in own)
    found = [Pause(0.0, 0.0, window.begin_s)]
    for a, b in pairwise(ends_s):
        if window.has(b):
            usual_s = step_s if b < change_s else later_step_s if a > change_s else max(step_s, later_step_s)
            found.append(Pause(b - a - usual_s, (b - a - usual_s) / usual_s, a))
    return max(found, key=lambda pause: pause.steps)


def longest_gap_s(times_s: Sequence[float], window: Window) -> float:
    """The longest time without an arrival that ends in the window, or lasts beyond it; its whole length counts."""
    gaps_s = [b - a for a, b in pairwise(times_s) if window.has(b)]
    left_s = max((at_s for at_s in times_s if at_s <= window.end_s), default=window.begin_s)
    return max([*gaps_s, window.end_s - left_s])


def longest_quiet_s(arrivals: Iterable[Arrival], window: Window) -> float:
    """The longest time in which nobody got a token."""
    return longest_gap_s([at_s for at_s, _, _ in arrivals], window)


def longest_silence_s(arrivals: Iterable[Arrival], window: Window) -> float:
    """The longest time that some client waited for its next token."""
    return max(longest_gap_s(times_s, window) for times_s in by_client(arrivals).values())


def by_client(arrivals: Iterable[Arrival]) -> Mapping[int, list[float]]:
    times_s: dict[int, list[float]] = {}
    for at_s, client, _ in arrivals:
        times_s.setdefault(client, []).append(at_s)
    return times_s


def steady_bytes(samples: Sequence[Sample]) -> tuple[float, float]:
    """Median bytes in all, and of pools."""
    return median(s.total_bytes for s in samples), median(s.pool_bytes for s in samples)


def peak_bytes(samples: Sequence[Sample]) -> tuple[int, int]:
    """Most bytes in all, and most of pools."""
    return max(s.total_bytes for s in samples), max(s.pool_bytes for s in samples)
