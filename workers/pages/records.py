"""The owner's part in a pool's ledger: it empties the records of pages that become KV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...errors import OperatorError
from .backend import PoolGeometry, runs
from .memfd import MemfdPool
from .sizing import pages_for
from .syscalls import punch_hole


def ledger_pages(geometry: PoolGeometry, record_bytes: int) -> int:
    """Pages of a ledger with one record for every page of the pool; 0 where there is none."""
    return pages_for(geometry.pages * record_bytes, geometry.page_bytes) if record_bytes else 0


class LedgerRecords:
    """Records of a pool's pages, one behind the other in the ledger's extent.

    Parameters
    ----------
    pool : MemfdPool
    pages : sequence of int
        The ledger's extent; empty where the pool has none.
    record_bytes : int

    Raises
    ------
    OperatorError
        The extent does not have the size that the records need.
    """

    def __init__(self, pool: MemfdPool, pages: Sequence[int], record_bytes: int) -> None:
        wanted = ledger_pages(pool.geometry, record_bytes)
        if len(pages) != wanted:
            raise OperatorError(
                f"pool {pool.geometry.name!r}: records of {record_bytes} bytes need a ledger of {wanted} pages, "
                f"found {len(pages)}: it was made for other KV blocks"
            )
        self._pool = pool
        self._pages = tuple(pages)
        self._record_bytes = record_bytes

    def clear(self, pages: Sequence[int]) -> None:
        """Make the records of ``pages`` zeros; whole pages of the kernel give their memory back."""
        if self._record_bytes:
            for first, count in runs(sorted(pages)):
                for offset, nbytes in self._where(first * self._record_bytes, count * self._record_bytes):
                    punch_hole(self._pool.fd, offset, nbytes)

    def _where(self, start: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Where these bytes of the extent lie in the pool, page by page."""
        size = self._pool.geometry.page_bytes
        end = start + nbytes
        while start < end:
            index, inside = divmod(start, size)
            part = min(end - start, size - inside)
            yield self._pages[index] * size + inside, part
            start += part
