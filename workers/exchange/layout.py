"""Where everything lies in a shared region. Without torch: a controller sizes regions.

    members   a line each: state, size, capacity, beat (written by that member only)
    doorbell  a line: rings so far
    fault     five lines: rank + 1 of the lost member, then why, as zero-ended UTF-8
    bells     a line each: bumped when there may be something to do for that member
    pairs     per (source, destination): a line `sent` and `wants`, a line `taken`; two slots of header and payload

Each line of 64 bytes has one writer (or an atomic counter), so that nobody's stores invalidate another's line.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import InternalError

LINE = 64
SLOTS = 2
REASON_BYTES = 5 * LINE - 8


@dataclass(frozen=True, slots=True)
class Layout:
    """Byte offsets in a region for ``size`` members with slots of ``capacity`` payload bytes (a multiple of 64)."""

    size: int
    capacity: int

    def member(self, rank: int) -> int:
        return rank * LINE

    @property
    def doorbell(self) -> int:
        return self.size * LINE

    @property
    def fault(self) -> int:
        return self.doorbell + LINE

    def bell(self, rank: int) -> int:
        return self.fault + 5 * LINE + rank * LINE

    def sent(self, source: int, destination: int) -> int:
        return self.bell(self.size) + (source * self.size + destination) * 2 * LINE

    def taken(self, source: int, destination: int) -> int:
        return self.sent(source, destination) + LINE

    def slot(self, source: int, destination: int, index: int) -> int:
        pair = source * self.size + destination
        return self.sent(self.size, 0) + (pair * SLOTS + index) * (LINE + self.capacity)

    @property
    def total(self) -> int:
        return self.slot(self.size, 0, 0)


def layout_for(size: int, capacity_bytes: int) -> Layout:
    """The layout whose slots hold at least ``capacity_bytes``."""
    if size < 1 or capacity_bytes < 1:
        raise InternalError(f"exchange: expected size and capacity of at least 1, got {size} and {capacity_bytes}")
    return Layout(size, -(-capacity_bytes // LINE) * LINE)


def region_bytes(size: int, capacity_bytes: int) -> int:
    """Bytes of a region for ``size`` members; messages beyond ``capacity_bytes`` travel in several rounds."""
    return layout_for(size, capacity_bytes).total
