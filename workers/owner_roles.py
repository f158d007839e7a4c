"""What a memory owner is told and what it says of its pool. Light, since an owner's process starts in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .pages.backend import PoolGeometry


@dataclass(frozen=True, slots=True)
class OwnerConfig:
    """What an owner needs to know.

    Parameters
    ----------
    name : str
        Of the pool, unique on its host.
    pages, page_bytes : int
        Geometry of the pool; its page table takes some of the pages.
    token : str
        Secret that workers must show to get the pool.
    huge_pages : bool
        Try to back weights by huge pages.
    address : str or None
        Unix socket, a path or ``@name``; None gives ``@concertina/<name>``, or a digest of a name that is too long.
    ledger_record_bytes : int
        Of a page's record in the pool's ledger; 0: no ledger.
    host : str
        Address of this node, at which other nodes read pages.
    keep : bool
        Keep the memory of freed pages until nothing is left in the pool: what comes next need not wait for any.
    reserve : bool
        Take all of the pool's memory from the system, beside what else is done, and keep it until the owner ends.
    """

    name: str
    pages: int
    page_bytes: int
    token: str = field(repr=False)
    huge_pages: bool = True
    address: str | None = None
    ledger_record_bytes: int = 0
    host: str = "127.0.0.1"
    keep: bool = False
    reserve: bool = False

    @property
    def keeps(self) -> bool:
        """Whether pages may begin with what was there before."""
        return self.keep or self.reserve

    @property
    def geometry(self) -> PoolGeometry:
        return PoolGeometry(self.name, self.pages, self.page_bytes)


@dataclass(frozen=True, slots=True)
class OwnerStats:
    """A pool's accounting: ``pages`` by purpose, adding up to the pool's size."""

    name: str
    address: str
    page_bytes: int
    pages: dict[str, int]
    resident_bytes: int
    huge_regions: int


@dataclass(frozen=True, slots=True)
class OwnerReport:
    """What an owner says of its pool.

    Parameters
    ----------
    version : int
        Of the extents; it grows with every change while this owner lives.
    pages : mapping or None
        Pages of every finished extent, the ledger's too. None: as they were in the version that the asker knows.
    loaded_bytes, copied_bytes : int
        Bytes read from the checkpoint, and bytes that came from peers, those of copies that failed half-way included.
    """

    version: int
    pages: Mapping[str, tuple[int, ...]] | None
    loaded_bytes: int
    copied_bytes: int
