"""P9: whatever moment an owner is killed at, no page becomes KV with a record of earlier KV."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from concertina.errors import InternalError, OperatorError
from concertina.workers.owner import MemoryOwner
from concertina.workers.pages import memfd, records, store
from concertina.workers.pages.backend import PoolGeometry
from concertina.workers.pages.records import ledger_pages
from concertina.workers.services import OwnerService
from hypothesis import given, settings
from hypothesis import strategies as st

from .pools import PAGE, config

RECORD = 192  # no divisor of a page: records straddle pages
KEYS = ("kv/a", "kv/b", "expert/0/0", "exchange/1")
PURPOSES = {"kv": "kv", "expert": "experts", "exchange": "exchange"}

key = st.sampled_from(KEYS)
some = st.lists(st.integers(0, 30), max_size=8)
operation = st.one_of(
    st.tuples(st.just("fill"), key, st.integers(1, 12)),
    st.tuples(st.just("extend"), key, st.integers(1, 12)),
    st.tuples(st.just("trim"), key, some),
    st.tuples(st.just("relabel"), key, some, key),
    st.tuples(st.just("free"), key),
    st.tuples(st.just("become"), key, key),
)


class Killed(BaseException):
    """The owner dies here."""


@contextmanager
def killed_after(effects: int) -> Iterator[None]:
    """Die before the effect of this number, or half-way through it where it can be halved."""
    left = [effects]

    def dying(effect: Callable[..., None], half: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                half(*arguments)
                raise Killed
            effect(*arguments)

        return run

    def half_written(fd: int, data: bytes, offset: int) -> None:
        os.pwrite(fd, data[: len(data) // 2], offset)

    def half_punched(fd: int, offset: int, nbytes: int) -> None:
        records_punch(fd, offset, max(1, nbytes // 2))

    store_write, records_punch, pool_punch = store._write, records.punch_hole, memfd.punch_hole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_write", dying(store_write, half_written))
        patch.setattr(records, "punch_hole", dying(records_punch, half_punched))
        patch.setattr(memfd, "punch_hole", dying(pool_punch, half_punched))
        yield


def record(owner: MemoryOwner, page: int) -> bytes:
    """As whoever maps the ledger sees it."""
    pages = owner.extent("ledger").pages
    ledger = b"".join(os.pread(owner.pool.fd, PAGE, p * PAGE) for p in pages)
    return ledger[page * RECORD : (page + 1) * RECORD]


def note(owner: MemoryOwner, pages: Sequence[int]) -> None:
    """Write records, as a worker does."""
    ledger = owner.extent("ledger").pages
    for page in pages:
        for at in range(page * RECORD, (page + 1) * RECORD, 64):
            os.pwrite(owner.pool.fd, b"\xff" * 64, ledger[at // PAGE] * PAGE + at % PAGE)


def purpose(key: str) -> Any:
    return PURPOSES[key.split("/")[0]]


def apply(service: OwnerService, op: tuple[Any, ...]) -> None:
    name, key, *rest = op
    there = service.report().pages.get(key, ())
    chosen = (
        list(dict.fromkeys(there[i % len(there)] for i in rest[0])) if name in ("trim", "relabel") and there else []
    )
    if name == "fill":
        service._owner.allocate(key, purpose(key), rest[0])
    elif name == "extend":
        service.extend(key, purpose(key), rest[0])
    elif name == "trim":
        service.trim(key, chosen)
    elif name == "relabel":
        service.relabel(key, chosen, rest[1])
    elif name == "free":
        service.free([key])
    else:
        service._owner.rename(key, rest[0], purpose(rest[0]))


def kv_pages(owner: MemoryOwner) -> set[int]:
    return {page for extent in owner.extents() if extent.purpose == "kv" for page in extent.pages}


def adopted(service: OwnerService) -> OwnerService:
    """What a new owner finds when this one is gone."""
    fd, name = os.dup(service._owner.pool.fd), service.config()
    service._owner.close()
    again = OwnerService.__new__(OwnerService)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryOwner, "adopt", classmethod(lambda cls, c, source, adopt=MemoryOwner.adopt: adopt(c, fd)))
        again.__init__(name, "a descriptor")  # type: ignore[misc]
    os.close(fd)
    return again


@given(st.lists(st.tuples(operation, st.integers(0, 8)), max_size=25))
@settings(max_examples=120, deadline=None)
def test_no_page_becomes_kv_with_a_record(steps: list[tuple[Any, int]]) -> None:
    service = OwnerService(config(80, RECORD))
    try:
        for op, effects in steps:
            before = kv_pages(service._owner)
            try:
                with killed_after(effects):
                    apply(service, op)
            except Killed:
                service = adopted(service)
            except (InternalError, OperatorError):
                assert kv_pages(service._owner) == before
            after = kv_pages(service._owner)
            assert not any(any(record(service._owner, page)) for page in after - before)
            assert all(all(record(service._owner, page)) for page in after & before)  # records travel with KV
            note(service._owner, after)
            usage = service.usage()
            assert sum(usage.values()) == 80
    finally:
        service._owner.close()


def test_a_pool_comes_with_its_ledger() -> None:
    owner = MemoryOwner(config(128, RECORD))
    assert len(owner.extent("ledger").pages) == ledger_pages(owner.pool.geometry, RECORD) == 6
    assert owner.extent("ledger").purpose == "table"
    with pytest.raises(InternalError, match="cannot be freed"):
        owner.free("ledger")
    owner.close()
    assert ledger_pages(PoolGeometry("x", 128, PAGE), 0) == 0


def test_a_ledger_of_other_records_is_not_adopted() -> None:
    owner = MemoryOwner(config(128, RECORD))
    fd, mine = os.dup(owner.pool.fd), owner.config
    owner.close()
    for record_bytes in (0, 64):
        with pytest.raises(OperatorError, match=f"records of {record_bytes} bytes need a ledger of . pages, found 6"):
            MemoryOwner.adopt(replace(mine, ledger_record_bytes=record_bytes), fd)
    MemoryOwner.adopt(mine, fd).close()
    os.close(fd)


def test_a_pool_too_small_for_its_ledger_is_refused() -> None:
    with pytest.raises(OperatorError, match="out of pages: table extent 'ledger'"):
        MemoryOwner(config(20, PAGE * 2))
