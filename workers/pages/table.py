"""The page table: which extent owns which pages of a pool. Pure bookkeeping.

An *extent* is a key (``"expert/3/17"``, ``"trunk"``, ``"kv/w0"``), a purpose and a list of pages, whose order is
the order of its bytes. Invariants P1 to P3 of docs/invariants.md hold after every operation; one that raises
changes nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
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
        self._runs: dict[str, list[int]] = {}  # of every extent: [first, count, first, count, ...], never changed
        self._free: list[tuple[int, int]] = [(0, pages)] if pages else []  # ascending runs, never adjacent

    def copy(self) -> PageTable:
        """An independent table with the same contents."""
        other = PageTable(self.pages)
        other._extents = dict(self._extents)
        other._runs = dict(self._runs)
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
        self._check_room(key, purpose, pages)
        return self._put(Extent(key, purpose, tuple(self._take(pages))))

    def extend(self, key: str, purpose: Purpose, pages: int) -> Extent:
        """Append ``pages`` free pages to an extent, or to a new one.

        Raises
        ------
        OperatorError
            As `allocate`.
        InternalError
            The extent has another purpose, or is the table's own; the purpose is unknown; ``pages`` is below 1.
        """
        old = self._extents.get(key, Extent(key, self._check_purpose(purpose), ()))
        if old.purpose != purpose or purpose == "table":
            raise InternalError(f"page table: extent {key!r} ({old.purpose}) cannot be extended as {purpose}")
        self._check_room(key, purpose, pages)
        return self._put(Extent(key, purpose, old.pages + tuple(self._take(pages))))

    def trim(self, key: str, pages: Collection[int]) -> Extent:
        """Free ``pages`` of an extent; returns what is left of it, and forgets it where nothing is.

        Raises
        ------
        InternalError
            No such key, a page that is not in the extent, or the table's own pages.
        """
        extent, gone = self.extent(key), set(pages)
        if extent.purpose == "table" or not gone <= set(extent.pages):
            raise InternalError(f"page table: extent {key!r} ({extent.purpose}): cannot free {len(gone)} pages of it")
        for first, count in runs(sorted(gone)):
            self._give(first, count)
        return self._put(Extent(key, extent.purpose, tuple(page for page in extent.pages if page not in gone)))

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
        self._remove(key)
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
        self._remove(key)
        return self._put(new)

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
        self._put(Extent(key, source.purpose, kept))
        return self._put(Extent(to_key, purpose, target.pages + tuple(pages)))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; pages as runs ``[first, count, first, count, ...]``."""
        extents = [[e.key, e.purpose, self._runs[e.key]] for e in self._extents.values()]
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
                table._put(Extent(key, purpose, tuple(pages)))
            table._free = _gaps(table.pages, (e.pages for e in table._extents.values()))
        except (KeyError, TypeError, ValueError, InternalError) as e:
            raise OperatorError(f"{source}: expected {{pages, extents: [[key, purpose, runs]]}}; {e}") from e
        return table

    def _put(self, extent: Extent) -> Extent:
        """Note an extent; one without pages disappears."""
        if extent.pages:
            self._extents[extent.key] = extent
            self._runs[extent.key] = [n for run in runs(extent.pages) for n in run]
        else:
            self._remove(extent.key)
        return extent

    def _remove(self, key: str) -> None:
        del self._extents[key], self._runs[key]

    def _in_use(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self.usage().items() if count and name != FREE)

    def _check_new(self, key: str, purpose: str) -> None:
        if key in self._extents:
            raise InternalError(f"page table: extent {key!r} exists already")
        self._check_purpose(purpose)

    def _check_room(self, key: str, purpose: str, pages: int) -> None:
        if pages < 1:
            raise InternalError(f"page table: extent {key!r}: pages: expected at least 1, got {pages}")
        free = sum(count for _, count in self._free)
        if pages > free:
            raise OperatorError(
                f"out of pages: {purpose} extent {key!r} wants {pages}, {free} of {self.pages} are free "
                f"(in use: {self._in_use()})"
            )

    def _check_purpose(self, purpose: Purpose | str) -> Purpose:
        if purpose not in PURPOSES:
            raise InternalError(f"page table: purpose: expected one of {PURPOSES}, got {purpose!r}")
        return purpose  # type: ignore[return-value]

    def _take(self, pages: int) -> list[int]:
        """The largest runs whole, until the rest fits one: the smallest that it fits; the lowest of equals."""
        largest = sorted(self._free, key=lambda run: (-run[1], run[0]))
        taken: list[int] = []
        whole = 0
        while largest[whole][1] < pages:
            first, count = largest[whole]
            taken.extend(range(first, first + count))
            pages, whole = pages - count, whole + 1
        used, fitting = set(largest[:whole]), (run for run in largest[whole:] if run[1] >= pages)
        best, count = min(fitting, key=lambda run: (run[1], run[0]))
        taken.extend(range(best, best + pages))
        rest = [(best + pages, count - pages)] if count > pages else []
        where = bisect_left(self._free, (best, count))
        self._free[where : where + 1] = rest
        if used:
            self._free = [run for run in self._free if run not in used]
        return taken

    def _give(self, first: int, count: int) -> None:
        at = bisect_left(self._free, (first, count))
        begin, end = at, at
        if at and sum(self._free[at - 1]) == first:
            begin, first, count = at - 1, self._free[at - 1][0], count + self._free[at - 1][1]
        if at < len(self._free) and self._free[at][0] == first + count:
            end, count = at + 1, count + self._free[at][1]
        self._free[begin:end] = [(first, count)]


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
