"""Reading pages of another pool: mapped where this host reaches it, over TCP elsewhere.

Whoever reads must know that the pages keep their contents meanwhile; a read holds them against being freed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...errors import ConcertinaError, InternalError
from .backend import PoolGeometry
from .memfd import MemfdPool
from .page_client import REQUEST_TIMEOUT_S, RemotePages
from .scatter import check_request, paired_runs, scatter
from .sharing import fetch_pool
from .store import newest_table
from .table import PageTable

_log = logging.getLogger(__name__)
_READ_BYTES = 16 << 20  # per system call, so that progress is seen

Copied = Callable[[int], None]
"""Called with the bytes that have arrived since the last call."""


@dataclass(frozen=True, slots=True)
class PageSource:
    """Where the pages of a pool can be read.

    Parameters
    ----------
    address : str
        Unix socket of its owner; "" where there is none.
    host, port : str, int
        The owner's page server; port 0: none.
    token : str
        Secret that both ask for.
    """

    address: str
    host: str
    port: int
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """An extent whose contents a peer has: ``pages`` of its pool, in the order of the extent's bytes."""

    key: str
    source: PageSource
    pages: tuple[int, ...]


class PageReader(Protocol):
    """An open way to a pool's pages, for one thread."""

    @property
    def geometry(self) -> PoolGeometry: ...

    def read_into(self, pages: Sequence[int], segments: Sequence[memoryview], copied: Copied | None = None) -> None:
        """Fill ``segments``, one after the other, with the bytes of ``pages``, in order.

        Raises
        ------
        InternalError
            The pool's side died, was too slow or refuses; pages outside the pool; segments of another size.
        """
        ...

    def close(self) -> None: ...
    def __enter__(self) -> PageReader: ...
    def __exit__(self, *_: object) -> None: ...


def open_pages(source: PageSource, timeout_s: float = 10.0, request_timeout_s: float = REQUEST_TIMEOUT_S) -> PageReader:
    """A reader of the pool at ``source``; see `RemotePages` for the times.

    Raises
    ------
    OperatorError
        The token is refused.
    InternalError
        Nobody answers.
    """
    if source.address:
        try:
            return LocalPages(fetch_pool(source.address, source.token, timeout_s))
        except ConcertinaError as e:
            if not source.port:
                raise
            _log.debug("%s; trying %s:%d", e, source.host, source.port)
    if not source.port:
        raise InternalError("pages of a peer: neither a socket nor a port is known")
    return RemotePages(source.host, source.port, source.token, timeout_s, request_timeout_s)


def read_table(reader: PageReader) -> PageTable:
    """A pool's table as it is now; raises as `PageReader.read_into`, and `OperatorError` if it is damaged."""
    size = reader.geometry.page_bytes

    def read(offset: int, nbytes: int) -> bytes:
        pages = range(offset // size, -(-(offset + nbytes) // size))
        memory = memoryview(bytearray(len(pages) * size))
        reader.read_into(pages, [memory])
        return bytes(memory[offset % size : offset % size + nbytes])

    return newest_table(read, reader.geometry)[1]


class LocalPages:
    """A pool of this host, read through its descriptor: one copy, without any mapping of its pages.

    Parameters
    ----------
    pool : MemfdPool
        Taken over.
    """

    def __init__(self, pool: MemfdPool) -> None:
        self._pool = pool

    @property
    def geometry(self) -> PoolGeometry:
        return self._pool.geometry

    def read_into(self, pages: Sequence[int], segments: Sequence[memoryview], copied: Copied | None = None) -> None:
        """See `PageReader.read_into`."""
        check_request(self.geometry, pages, segments)
        with self._pool.holds() as holds:
            holds.share(pages)
            for offset, memory in scatter(self.geometry, pages, segments, _READ_BYTES):
                _read(self._pool.fd, offset, memory)
                if copied:
                    copied(len(memory))

    def copy_to(
        self, pages: Sequence[int], pool: MemfdPool, to_pages: Sequence[int], copied: Copied | None = None
    ) -> None:
        """Copy pages to those of another pool of this host, which the caller holds. Neither side is mapped.

        Pages that are not there yet are made on the way, and not zeroed before.

        Raises
        ------
        InternalError
            Another number of pages, or pages of another size; pages outside a pool.
        """
        if len(pages) != len(to_pages) or pool.geometry.page_bytes != self.geometry.page_bytes:
            raise InternalError(
                f"copy: {len(pages)} pages of {self.geometry.page_bytes} bytes for {len(to_pages)} of "
                f"{pool.geometry.page_bytes}"
            )
        self._pool.check_pages(pages)
        pool.check_pages(to_pages)
        with self._pool.holds() as holds:
            holds.share(pages)
            for first, to_first, count in paired_runs(pages, to_pages):
                size = self.geometry.page_bytes
                _copy(self._pool.fd, first * size, pool.fd, to_first * size, count * size, copied)

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> LocalPages:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _copy(fd: int, offset: int, to_fd: int, to_offset: int, nbytes: int, copied: Copied | None) -> None:
    done = 0
    while done < nbytes:
        count = _copy_some(fd, offset + done, to_fd, to_offset + done, min(_READ_BYTES, nbytes - done))
        done += count
        if copied:
            copied(count)


def _copy_some(fd: int, offset: int, to_fd: int, to_offset: int, nbytes: int) -> int:
    try:
        return os.copy_file_range(fd, to_fd, nbytes, offset, to_offset)
    except OSError:  # not every kernel does that for memory files; what else is wrong is met again
        return os.pwrite(to_fd, os.pread(fd, nbytes, offset), to_offset)


def _read(fd: int, offset: int, memory: memoryview) -> None:
    while memory:  # a pool's size is sealed, so a read inside it never comes back empty
        count = os.preadv(fd, [memory], offset)
        memory, offset = memory[count:], offset + count
