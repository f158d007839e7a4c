"""What is mapped where in a range, kept by spans: a whole pool mapped in order is one, however many pages it has."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Generic, TypeVar

PoolT = TypeVar("PoolT")


@dataclass(frozen=True, slots=True)
class Span(Generic[PoolT]):
    """``count`` pages of a pool from ``page`` on, at as many positions from ``position`` on."""

    position: int
    count: int
    pool: PoolT
    page: int

    @property
    def end(self) -> int:
        return self.position + self.count

    def cut(self, first: int, end: int) -> Span[PoolT]:
        """The part at positions ``first`` to ``end``, which overlap the span."""
        first, end = max(first, self.position), min(end, self.end)
        return Span(first, end - first, self.pool, self.page + first - self.position)


class Spans(Generic[PoolT]):
    """Spans that do not overlap, by position."""

    def __init__(self) -> None:
        self._spans: list[Span[PoolT]] = []

    def __len__(self) -> int:
        return len(self._spans)

    def add(self, spans: list[Span[PoolT]]) -> None:
        """Note consecutive spans at positions that are free."""
        if spans:
            at = bisect_left(self._spans, spans[0].position, key=_position)
            self._spans[at:at] = spans

    def remove(self, first: int, end: int) -> list[Span[PoolT]]:
        """Forget positions ``first`` to ``end``; returns what was there."""
        begin, stop = self._overlapping(first, end)
        touched = self._spans[begin:stop]
        kept = [span.cut(span.position, first) for span in touched[:1] if span.position < first]
        kept += [span.cut(end, span.end) for span in touched[-1:] if span.end > end]
        self._spans[begin:stop] = kept
        return [span.cut(first, end) for span in touched]

    def any(self, first: int, end: int) -> bool:
        """Whether one of the positions is mapped."""
        begin, stop = self._overlapping(first, end)
        return begin < stop

    def gap(self, first: int, end: int) -> int | None:
        """The first of the positions that is not mapped; None where all are."""
        begin, stop = self._overlapping(first, end)
        for span in self._spans[begin:stop]:
            if span.position > first:
                break
            first = span.end
        return first if first < end else None

    def _overlapping(self, first: int, end: int) -> tuple[int, int]:
        if first >= end:
            return 0, 0
        begin = bisect_right(self._spans, first, key=_position)
        if begin and self._spans[begin - 1].end > first:
            begin -= 1
        return begin, bisect_left(self._spans, end, lo=begin, key=_position)


def _position(span: Span[PoolT]) -> int:
    return span.position
