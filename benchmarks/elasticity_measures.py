"""What the times of tokens and the samples of memory say. Pure.

Arrivals are (monotonic seconds, client, tokens) in the order of time. Several workers step together, so that the gap
between two arrivals of whatever clients is the time in which no worker made a step that anybody saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from .elasticity_memory import Sample

Arrival = tuple[float, int, int]


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


def median_step_s(arrivals: Iterable[Arrival], window: Window) -> float:
    """Median time between two tokens of one client."""
    gaps_s = [b - a for times_s in by_client(arrivals).values() for a, b in pairwise(times_s) if window.has(b)]
    return median(gaps_s)


def longest_gap_s(times_s: Sequence[float], window: Window) -> float:
    """The longest time without an arrival that ends in the window, or lasts beyond it; its whole length counts."""
    gaps_s = [b - a for a, b in pairwise(times_s) if window.has(b)]
    left_s = max((at_s for at_s in times_s if at_s <= window.end_s), default=window.begin_s)
    return max([*gaps_s, window.end_s - left_s])


def longest_quiet_s(arrivals: Iterable[Arrival], window: Window) -> float:
    """The longest time in which nobody got a token."""
    return longest_gap_s([at_s for at_s, _, _ in arrivals], window)


def longest_quiet_at_s(arrivals: Iterable[Arrival], window: Window) -> float:
    """When the longest time in which nobody got a token began, of those that ended in the window."""
    times_s = [at_s for at_s, _, _ in arrivals]
    return max((b - a, a) for a, b in pairwise(times_s) if window.has(b))[1]


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
