"""How large pages are, and where tensors lie inside an extent."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import InternalError

MIN_PAGE_BYTES = 64 << 10
MAX_PAGE_BYTES = 2 << 20
_MOST_WASTE = 1 / 8


def choose_page_bytes(sizes: Sequence[int]) -> int:
    """Page size for extents of the given sizes.

    The largest power of two from 64 KiB to 2 MiB that wastes at most an eighth of the bytes asked for in the
    extents' last pages; where none does, the least wasteful, the larger one of equals.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of every extent (an expert, the trunk, a KV block); repeat a size as often as it occurs.

    Raises
    ------
    InternalError
        A negative size.
    """
    if min(sizes, default=0) < 0:
        raise InternalError(f"page size: extent sizes must not be negative, got {min(sizes)}")
    choices = [MAX_PAGE_BYTES >> shift for shift in range((MAX_PAGE_BYTES // MIN_PAGE_BYTES).bit_length())]
    waste = {page: sum(-size % page for size in sizes) for page in choices}
    good = [page for page in choices if waste[page] <= _MOST_WASTE * sum(sizes)]
    return good[0] if good else min(choices, key=lambda page: (waste[page], -page))


def pages_for(nbytes: int, page_bytes: int) -> int:
    """Pages that hold ``nbytes`` bytes, at least 1."""
    return max(1, -(-nbytes // page_bytes))


def pack(sizes: Sequence[int], align: int = 64) -> tuple[list[int], int]:
    """Lay items one behind the other, each at a multiple of ``align`` bytes.

    Returns
    -------
    offsets : list of int
    total : int
        Bytes from 0 to the end of the last item.
    """
    offsets, end = [], 0
    for size in sizes:
        start = end + -end % align
        offsets.append(start)
        end = start + size
    return offsets, end
