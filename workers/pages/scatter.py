"""Pages of a pool on one side, pieces of memory on the other: which bytes go where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...errors import InternalError
from .backend import PoolGeometry, runs


def check_request(geometry: PoolGeometry, pages: Sequence[int], segments: Sequence[memoryview]) -> None:
    """Raise InternalError unless the pages lie in the pool and the segments are as large as they."""
    if pages and (min(pages) < 0 or max(pages) >= geometry.pages):
        raise InternalError(f"pool {geometry.name!r}: pages {min(pages)}..{max(pages)} outside 0..{geometry.pages - 1}")
    wanted, there = len(pages) * geometry.page_bytes, sum(segment.nbytes for segment in segments)
    if wanted != there:
        raise InternalError(
            f"pool {geometry.name!r}: {len(pages)} pages have {wanted} bytes, the memory meant for them {there}"
        )


def paired_runs(pages: Sequence[int], to_pages: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Pages that are adjacent on both sides: (first page, first page there, count)."""
    to_runs = iter(runs(to_pages))
    to_first, room = 0, 0
    for first, count in runs(pages):
        while count:
            if not room:
                to_first, room = next(to_runs)
            part = min(count, room)
            yield first, to_first, part
            first, count, to_first, room = first + part, count - part, to_first + part, room - part


def scatter(
    geometry: PoolGeometry, pages: Sequence[int], segments: Sequence[memoryview], most_bytes: int
) -> Iterator[tuple[int, memoryview]]:
    """Pieces that are contiguous on both sides: (offset in the pool, memory), at most ``most_bytes`` each."""
    size, ahead, memory = geometry.page_bytes, iter(segments), memoryview(b"")
    for first, count in runs(pages):
        offset, end = first * size, (first + count) * size
        while offset < end:
            if not memory:
                memory = next(ahead).cast("B")
                continue
            part = memory[: min(end - offset, most_bytes)]
            yield offset, part
            memory, offset = memory[len(part) :], offset + len(part)
