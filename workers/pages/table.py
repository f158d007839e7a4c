"""The page table: which extent owns which pages of a pool. Pure bookkeeping.

An *extent* is a key (``"expert/3/17"``, ``"trunk"``, ``"kv/w0"``), a purpose and a list of pages, whose order is
the order of its bytes. Invariants P1 to P3 of docs/invariants.md hold after every operation; one that raises
changes nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ...errors import InternalError, OperatorError
from .backend import runs

Purpose = Literal["table", "experts", "trunk", "kv", "exchange"]
PURPOSES: tuple[str, ...] = get_args(Purpose)
FREE = "free"


@dataclass(frozen=True, slots=True)
class Extent:
    """Pages of one key, in the order of the extent's bytes."""

    key: str
    purpose: Purpose
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExtentRequest:
    """An extent wanted: ``pages`` is how many, at least 1."""

    key: str
    purpose: Purpose
    pages: int


class PageTable:
    """Extents of a pool of ``pages`` pages.

    Parameters
    ----------
    pages : int
        Pages of the pool.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._extents: dict[str, Extent] = {}
        self._free: list[tuple[int, int]] = [(0, pages)] if pages else []  # ascending runs, never adjacent

    def copy(self) -> PageTable:
        """An independent table with the same contents."""
        other = PageTable(self.pages)
        other._extents = dict(self._extents)
        other._free = list(self._free)
        return other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageTable) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable

    @property
    def extents(self) -> Mapping[str, Extent]:
        return dict(self._extents)

    @property
    def free_runs(self) -> list[tuple[int, int]]:
        """Free pages as (first, count), ascending."""
        return list(self._free)

    def usage(self) -> dict[str, int]:
        """Pages by purpose, ``"free"`` among them; the values add up to the pool's pages."""
        counts = dict.fromkeys((*PURPOSES, FREE), 0)
        for extent in self._extents.values():
            counts[extent.purpose] += len(extent.pages)
        counts[FREE] = sum(count for _, count in self._free)
        return counts

    def extent(self, key: str) -> Extent:
        """The extent of a key.

        Raises
        ------
        InternalError
            No such key.
        """
        try:
            return self._extents[key]
        except KeyError:
            raise InternalError(f"page table: no extent {key!r} among {len(self._extents)}") from None

    def allocate(self, key: str, purpose: Purpose, pages: int) -> Extent:
        """Give ``pages`` free pages to a new key, as few runs as the free space allows, lowest pages first.

        Raises
        ------
        OperatorError
            Fewer pages are free; the message says for which purpose, how many were wanted and are free.
        InternalError
            The key exists, the purpose is unknown, or ``pages`` is below 1.
        """
        self._check_new(key, purpose)
        if pages < 1:
            raise InternalError(f"page table: extent {key!r}: pages: expected at least 1, got {pages}")
        free = sum(count for _, count in self._free)
        if pages > free:
            raise OperatorError(
                f"out of pages: {purpose} extent {key!r} wants {pages}, {free} of {self.pages} are free "
                f"(in use: {self._in_use()})"
            )
        extent = Extent(key, purpose, tuple(self._take(pages)))
        self._extents[key] = extent
        return extent

    def free(self, key: str) -> Extent:
        """Give an extent's pages back; returns what it was.

        Raises
        ------
        InternalError
            No such key, or the table's own pages.
        """
        extent = self.extent(key)
        if extent.purpose == "table":
            raise InternalError("page table: its own pages cannot be freed")
        del self._extents[key]
        for first, count in runs(sorted(extent.pages)):
            self._give(first, count)
        return extent

    def rename(self, key: str, new_key: str, purpose: Purpose | None = None) -> Extent:
        """Give an extent another key, and another purpose unless None; pages and contents stay.

        Raises
        ------
        InternalError
            No such key, the new one exists, or a purpose that is unknown or ``"table"``.
        """
        old = self.extent(key)
        if new_key != key:
            self._check_new(new_key, purpose or old.purpose)
        new = Extent(new_key, self._check_purpose(purpose or old.purpose), old.pages)
        if "table" in (old.purpose, new.purpose) and old != new:
            raise InternalError(f"page table: extent {key!r}: the table's own pages keep key and purpose")
        del self._extents[key]
        self._extents[new_key] = new
        return new

    def move_pages(self, key: str, pages: Sequence[int], to_key: str, purpose: Purpose) -> Extent:
        """Take ``pages`` out of one extent and append them, in this order, to another or a new one.

        An extent left without pages disappears. Returns the extent that has them now.

        Raises
        ------
        InternalError
            A page is not in the extent or is named twice, or the other extent has another purpose.
        """
        source, wanted = self.extent(key), set(pages)
        if not pages or len(wanted) != len(pages) or not wanted <= set(source.pages):
            raise InternalError(f"page table: extent {key!r}: cannot take pages {list(pages)} out of it")
        target = self._extents.get(to_key, Extent(to_key, self._check_purpose(purpose), ()))
        if key == to_key or target.purpose != purpose or "table" in (source.purpose, purpose):
            raise InternalError(
                f"page table: pages cannot move from {key!r} ({source.purpose}) to {to_key!r} "
                f"({target.purpose}) as {purpose}"
            )
        kept = tuple(page for page in source.pages if page not in wanted)
        self._extents[key] = Extent(key, source.purpose, kept)
        if not kept:
            del self._extents[key]
        self._extents[to_key] = Extent(to_key, purpose, target.pages + tuple(pages))
        return self._extents[to_key]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; pages as runs ``[first, count, first, count, ...]``."""
        extents = [[e.key, e.purpose, [n for run in runs(e.pages) for n in run]] for e in self._extents.values()]
        return {"pages": self.pages, "extents": extents}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "page table") -> PageTable:
        """Read what `to_dict` wrote.

        Raises
        ------
        OperatorError
            Malformed, a page outside the pool, or one that two extents claim.
        """
        try:
            table = cls(int(data["pages"]))
            for key, purpose, numbers in data["extents"]:
                pages = [
                    page
                    for first, count in zip(numbers[::2], numbers[1::2], strict=True)
                    for page in range(first, first + count)
                ]
                table._check_new(key, purpose)
                table._extents[key] = Extent(key, purpose, tuple(pages))
            table._free = _gaps(table.pages, (e.pages for e in table._extents.values()))
        except (KeyError, TypeError, ValueError, InternalError) as e:
            raise OperatorError(f"{source}: expected {{pages, extents: [[key, purpose, runs]]}}; {e}") from e
        return table

    def _in_use(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self.usage().items() if count and name != FREE)

    def _check_new(self, key: str, purpose: str) -> None:
        if key in self._extents:
            raise InternalError(f"page table: extent {key!r} exists already")
        self._check_purpose(purpose)

    def _check_purpose(self, purpose: Purpose | str) -> Purpose:
        if purpose not in PURPOSES:
            raise InternalError(f"page table: purpose: expected one of {PURPOSES}, got {purpose!r}")
        return purpose  # type: ignore[return-value]

    def _take(self, pages: int) -> list[int]:
        taken: list[int] = []
        while pages:
            fitting = [run for run in self._free if run[1] >= pages]
            first, count = min(fitting, key=_size) if fitting else max(self._free, key=_size)
            used = min(count, pages)
            at = bisect_left(self._free, (first, count))
            self._free[at : at + 1] = [(first + used, count - used)] if count > used else []
            taken.extend(range(first, first + used))
            pages -= used
        return taken

    def _give(self, first: int, count: int) -> None:
        at = bisect_left(self._free, (first, count))
        begin, end = at, at
        if at and sum(self._free[at - 1]) == first:
            begin, first, count = at - 1, self._free[at - 1][0], count + self._free[at - 1][1]
        if at < len(self._free) and self._free[at][0] == first + count:
            end, count = at + 1, count + self._free[at][1]
        self._free[begin:end] = [(first, count)]


def _size(run: tuple[int, int]) -> int:
    return run[1]


def _gaps(pages: int, used: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    taken = sorted(page for extent in used for page in extent)
    if len(set(taken)) != len(taken):
        raise ValueError("two extents claim one page")
    if taken and not (taken[0] >= 0 and taken[-1] < pages):
        raise ValueError(f"pages {taken[0]}..{taken[-1]} outside 0..{pages - 1}")
    gaps, at = [], 0
    for first, count in runs(taken):
        if first > at:
            gaps.append((at, first - at))
        at = first + count
    return [*gaps, (at, pages - at)] if at < pages else gaps
