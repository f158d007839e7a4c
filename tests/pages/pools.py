"""Owners for tests, and what lies in their pages."""

from __future__ import annotations

import os
import threading
from itertools import count

from concertina.workers.owner import MemoryOwner
from concertina.workers.owner_roles import OwnerConfig
from concertina.workers.pages.memfd import map_pages

PAGE = 4096
_number = count()


def config(pages: int = 128, record_bytes: int = 0, token: str = "secret") -> OwnerConfig:
    """Of a pool with a name of its own."""
    name = f"pools-{os.getpid()}-{next(_number)}"
    return OwnerConfig(name, pages, PAGE, token, huge_pages=False, ledger_record_bytes=record_bytes)


def no_thread(_: threading.Thread) -> None:
    """What `threading.Thread.start` does where the system allows no more threads."""
    raise RuntimeError("can't start new thread")


def read(owner: MemoryOwner, pages: tuple[int, ...]) -> bytes:
    return b"".join(os.pread(owner.pool.fd, PAGE, page * PAGE) for page in pages)


def write(owner: MemoryOwner, pages: tuple[int, ...], seed: int = 0) -> bytes:
    """Different bytes in every page; returns them."""
    data = b"".join((seed * 1000 + page).to_bytes(4, "little") * (PAGE // 4) for page in pages)
    map_pages(owner.pool, pages).memory()[:] = data
    return data
