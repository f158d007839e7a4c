"""The page table in the pool's own first pages, so that a pool explains itself to whoever holds its descriptor.

Layout: a superblock (geometry, written once), then two copies of the table. A change goes to the older copy, under a
higher generation and a checksum; an owner killed half-way leaves the other copy valid.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable

from ...errors import OperatorError
from .backend import PoolGeometry
from .memfd import MemfdBackend, MemfdPool
from .table import PageTable

_MAGIC = b"CNCRTNA1"
_SUPERBLOCK_BYTES = 4096
_COPY_BYTES = 16 << 10  # of one copy, and
_COPY_BYTES_PER_PAGE = 64  # for each page more: room for every page being an extent of its own
_HEADER = struct.Struct("<8sQQI")  # magic, generation, payload bytes, checksum of the two and the payload
TABLE_KEY = "table"

ReadBytes = Callable[[int, int], bytes]
"""Gives the bytes of a pool from an offset, so many."""


def table_pages(geometry: PoolGeometry) -> int:
    """How many of a pool's first pages hold its superblock and table."""
    return -(-(_SUPERBLOCK_BYTES + 2 * _copy_bytes(geometry)) // geometry.page_bytes)


def _copy_bytes(geometry: PoolGeometry) -> int:
    return _COPY_BYTES + _COPY_BYTES_PER_PAGE * geometry.pages


def _offset(geometry: PoolGeometry, generation: int) -> int:
    return _SUPERBLOCK_BYTES + generation % 2 * _copy_bytes(geometry)


class TableStore:
    """Reads and writes a pool's table.

    Parameters
    ----------
    pool : MemfdPool
    """

    def __init__(self, pool: MemfdPool) -> None:
        self.pool = pool
        self._copy_bytes = _copy_bytes(pool.geometry)
        self.generation = 0

    @classmethod
    def format(cls, pool: MemfdPool) -> tuple[TableStore, PageTable]:
        """Write the superblock and a table with nothing but its own pages.

        Raises
        ------
        OperatorError
            The pool is too small for its table.
        """
        needed = table_pages(pool.geometry)
        if needed >= pool.geometry.pages:
            raise OperatorError(
                f"pool {pool.geometry.name!r}: pages: its table alone needs {needed} of {pool.geometry.pages}"
            )
        geometry = pool.geometry
        described = {"name": geometry.name, "pages": geometry.pages, "page_bytes": geometry.page_bytes}
        block = _sealed(0, json.dumps(described).encode())
        if len(block) > _SUPERBLOCK_BYTES:
            raise OperatorError(f"pool: name: longer than fits {_SUPERBLOCK_BYTES} bytes")
        store, table = cls(pool), PageTable(geometry.pages)
        table.allocate(TABLE_KEY, "table", needed)
        store.write(table)
        _write(pool.fd, block, 0)  # last: a pool with a superblock has a table
        return store, table

    def write(self, table: PageTable) -> None:
        """Make ``table`` the durable one.

        Raises
        ------
        OperatorError
            It does not fit; the durable table is still the one before.
        """
        payload = json.dumps(table.to_dict(), separators=(",", ":")).encode()
        if _HEADER.size + len(payload) > self._copy_bytes:
            raise OperatorError(
                f"pool {self.pool.geometry.name!r}: {len(table.extents)} extents do not fit its page table "
                f"({len(payload)} of {self._copy_bytes} bytes); use shorter keys, fewer extents or more pages"
            )
        generation = self.generation + 1
        _write(self.pool.fd, _sealed(generation, payload), _offset(self.pool.geometry, generation))
        self.generation = generation

    def read(self) -> PageTable:
        """The newest intact table.

        Raises
        ------
        OperatorError
            Neither copy is intact.
        """
        self.generation, table = newest_table(
            lambda offset, nbytes: os.pread(self.pool.fd, nbytes, offset), self.pool.geometry
        )
        return table


def newest_table(read: ReadBytes, geometry: PoolGeometry) -> tuple[int, PageTable]:
    """Generation and contents of a pool's newest intact table; raises as `TableStore.read`.

    Reads headers and the payload of one copy only, unless that is damaged. Its owner may write meanwhile.
    """
    offsets = [_offset(geometry, which) for which in (0, 1)]
    for offset in sorted(offsets, key=lambda offset: _claims(read, offset)[0], reverse=True):
        # The header is read anew: while one copy was found damaged, the other may have become the newest.
        nbytes = _HEADER.size + _claims(read, offset)[1]
        copy = _unsealed(read(offset, min(nbytes, _copy_bytes(geometry))))
        if copy:
            generation, payload = copy
            return generation, PageTable.from_dict(json.loads(payload), source=f"pool {geometry.name!r}: page table")
    raise OperatorError(f"pool {geometry.name!r}: both copies of its page table are damaged")


def _claims(read: ReadBytes, offset: int) -> tuple[int, int]:
    """Generation and payload bytes of a copy as its header has them; nothing is checked."""
    _, generation, nbytes, _ = _HEADER.unpack(read(offset, _HEADER.size))
    return generation, nbytes


def open_pool(fd: int) -> MemfdPool:
    """A formatted pool from nothing but its descriptor, which the pool takes over.

    Raises
    ------
    OperatorError
        Not a sealed memfd with an intact superblock.
    """
    try:
        block = _unsealed(os.pread(fd, _SUPERBLOCK_BYTES, 0))
        if block is None:
            raise OperatorError("descriptor: not a page pool (no superblock in its first bytes)")
        described = json.loads(block[1])
        geometry = PoolGeometry(described["name"], described["pages"], described["page_bytes"])
        return MemfdBackend().import_pool([fd], geometry)
    except BaseException:
        os.close(fd)
        raise


def _sealed(generation: int, payload: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, generation, len(payload), _checksum(generation, payload)) + payload


def _checksum(generation: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<QQ", generation, len(payload))))


def _unsealed(block: bytes) -> tuple[int, bytes] | None:
    """Generation and payload of a block that begins with its header; None if it is damaged."""
    if len(block) < _HEADER.size:
        return None
    magic, generation, nbytes, checksum = _HEADER.unpack_from(block)
    payload = block[_HEADER.size : _HEADER.size + nbytes]
    if magic != _MAGIC or len(payload) != nbytes or _checksum(generation, payload) != checksum:
        return None
    return generation, payload


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
