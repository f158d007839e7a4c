"""What a device must be able to do with pages: the same verbs on cpu (memfd), CUDA and Ascend (driver virtual memory).

A *pool* is physical memory cut into equal pages; a *range* is reserved addresses of one process. On a GPU every
page is one allocation handle with a file descriptor of its own, hence the plural in `PagePool.export`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ...errors import OperatorError


@dataclass(frozen=True, slots=True)
class PoolGeometry:
    """Size of a pool: ``pages`` pages of ``page_bytes`` bytes (a power of two, at least 4096).

    Raises
    ------
    OperatorError
        A number outside these bounds.
    """

    name: str
    pages: int
    page_bytes: int

    def __post_init__(self) -> None:
        if self.pages < 1:
            raise OperatorError(f"pool {self.name!r}: pages: expected at least 1, got {self.pages}")
        if self.page_bytes < 4096 or self.page_bytes & (self.page_bytes - 1):
            raise OperatorError(
                f"pool {self.name!r}: page_bytes: expected a power of two from 4096 up, got {self.page_bytes}"
            )

    @property
    def total_bytes(self) -> int:
        return self.pages * self.page_bytes


class PagePool(Protocol):
    """Physical pages, numbered from 0; alive while any process holds a descriptor or a mapping."""

    @property
    def geometry(self) -> PoolGeometry: ...

    def export(self) -> tuple[int, ...]:
        """File descriptors that another process can import; they stay this pool's own."""
        ...

    def free(self, pages: Sequence[int]) -> None:
        """Give the physical memory of ``pages`` back; raises `holds.PagesHeld` while a range maps one of them."""
        ...

    def resident_bytes(self) -> int:
        """Physical memory in use now."""
        ...

    def close(self) -> None:
        """Let go of the descriptors; mapped ranges stay valid."""
        ...


PoolT = TypeVar("PoolT", bound=PagePool)
OtherPoolT = TypeVar("OtherPoolT", bound=PagePool, contravariant=True)


class PageRange(Protocol[OtherPoolT]):
    """Reserved addresses for a number of pages; positions are page-sized and begin unmapped."""

    @property
    def positions(self) -> int: ...

    def map(self, position: int, pool: OtherPoolT, pages: Sequence[int], *, writable: bool = True) -> None:
        """Map ``pages`` of the pool at consecutive unmapped positions; they count as held until unmapped."""
        ...

    def unmap(self, position: int, count: int) -> None:
        """Make positions unmapped again; touching one faults."""
        ...


RangeT = TypeVar("RangeT", covariant=True)


class PageBackend(Protocol[PoolT, RangeT]):
    """The verbs of one kind of device."""

    @property
    def kind(self) -> str: ...

    def create(self, geometry: PoolGeometry) -> PoolT: ...

    def import_pool(self, descriptors: Sequence[int], geometry: PoolGeometry) -> PoolT:
        """Make a pool of what another process's `PagePool.export` gave; takes the descriptors over."""
        ...

    def reserve(self, positions: int, page_bytes: int, *, first_page: int = 0) -> RangeT:
        """Reserve addresses; ``first_page`` is the pool page meant for position 0 (aligns huge pages)."""
        ...

    def copy(self, source: PoolT, source_pages: Sequence[int], to: PoolT, to_pages: Sequence[int]) -> None:
        """Copy pages one by one; the pools have the same page size."""
        ...


class PageNumbers(tuple[int, ...]):
    """Page numbers that travel between processes as runs: a large KV extent is a few bytes instead of megabytes."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _expand, (runs(self),)


def _expand(found: Sequence[tuple[int, int]]) -> PageNumbers:
    return PageNumbers(page for first, count in found for page in range(first, first + count))


def runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Adjacent ascending pages as (first, count), in order: ``[4, 5, 6, 2] -> [(4, 3), (2, 1)]``."""
    if isinstance(pages, range) and pages.step == 1:  # a whole pool, say, whose million pages nobody wants to count
        return [(pages.start, len(pages))] if pages else []
    if not pages:
        return []
    found: list[tuple[int, int]] = []
    first = end = pages[0]
    for page in pages:
        if page != end:
            found.append((first, end - first))
            first = page
        end = page + 1
    found.append((first, end - first))
    return found
