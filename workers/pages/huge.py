"""Backing a pool's pages with huge pages where the kernel has some to give."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator

from .backend import runs
from .ranges import HUGE_BYTES, MemfdRange
from .syscalls import collapse

Run = tuple[int, int]
_TOGETHER = 64


class HugePages:
    """Which 2 MiB regions of a pool are huge.

    Parameters
    ----------
    window : MemfdRange
        Maps the whole pool from page 0.
    collapse : callable
        Backs (address, bytes) by a huge page, or returns False.
    """

    def __init__(self, window: MemfdRange, collapse: Callable[[int, int], bool] = collapse) -> None:
        self._window = window
        self._kernel_collapse = collapse
        self._huge: set[int] = set()

    @property
    def regions(self) -> int:
        """Regions that were collapsed and not given back since."""
        return len(self._huge)

    def collapse(self, wanted: Iterable[Run], free: Iterable[Run]) -> int:
        """Collapse regions that ``wanted`` runs of pages touch; returns how many became huge. ``free`` ascends.

        Regions with a free page are left alone, because a huge page takes all its memory at once. Where the
        kernel refuses, the region keeps small pages with the same contents, and the next one is tried.
        """
        regions = self._touched(wanted) - self._huge
        regions -= self._with_free_pages(regions, list(free))
        whole = self._window.nbytes // HUGE_BYTES
        asked = runs(sorted(region for region in regions if region < whole))
        won = {region for first, count in asked for part in _parts(first, count) for region in self._won(part)}
        self._huge |= won
        return len(won)

    def reserve(self) -> Iterator[range]:
        """Collapse every region, free ones too; yields a few at a time when they have been tried."""
        for part in _parts(0, self._window.nbytes // HUGE_BYTES):
            self._huge |= set(self._won(part))
            yield part

    def forget(self, freed: Iterable[Run]) -> None:
        """Pages were given back; the kernel has split their huge pages."""
        self._huge -= self._touched(freed)

    def _won(self, part: range) -> Iterable[int]:
        """Regions of ``part`` that became huge; where the kernel refuses one of them, each is tried alone."""
        if self._collapse(part):
            return part
        return [region for region in part if len(part) > 1 and self._collapse(range(region, region + 1))]

    def _collapse(self, part: range) -> bool:
        for region in part:  # one without any page is refused (EINVAL); reading makes one
            self._window.memory(region * HUGE_BYTES, 1).tobytes()
        return self._kernel_collapse(self._window.address + part.start * HUGE_BYTES, len(part) * HUGE_BYTES)

    def _with_free_pages(self, regions: Iterable[int], free: list[Run]) -> set[int]:
        """Looked up per region: a large pool has many more regions that are free as a whole."""
        size = self._window.page_bytes

        def has_free(region: int) -> bool:
            start, end = region * HUGE_BYTES, (region + 1) * HUGE_BYTES
            at = bisect_left(free, (-(-end // size), 0))  # the first run that begins behind the region
            return at > 0 and sum(free[at - 1]) * size > start

        return {region for region in regions if has_free(region)}

    def _touched(self, runs: Iterable[Run]) -> set[int]:
        size = self._window.page_bytes
        return {
            region
            for first, count in runs
            for region in range(first * size // HUGE_BYTES, -(-(first + count) * size // HUGE_BYTES))
        }


def _parts(first: int, count: int) -> list[range]:
    """Adjoining regions together: each call has a cost of its own, and 64 at once took a fifth of the time."""
    ends = first + count
    return [range(at, min(at + _TOGETHER, ends)) for at in range(first, ends, _TOGETHER)]
