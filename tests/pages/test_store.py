"""P4: whatever moment an owner is killed at, the pool's table reads as before or as after the change."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from concertina.errors import OperatorError
from concertina.workers.pages.backend import PoolGeometry
from concertina.workers.pages.memfd import MemfdBackend, MemfdPool
from concertina.workers.pages.store import TableStore, newest_table, open_pool, table_pages
from concertina.workers.pages.table import PageTable
from concertina.workers.pages.transfer import LocalPages, read_table
from hypothesis import given, settings
from hypothesis import strategies as st

GEOMETRY = PoolGeometry("store-test", 64, 4096)


def read_by_pages(pool: MemfdPool) -> PageTable:
    """As another process does."""
    with LocalPages(open_pool(os.dup(pool.fd))) as reader:
        return read_table(reader)


@pytest.fixture
def pool() -> Iterator[MemfdPool]:
    pool = MemfdBackend().create(GEOMETRY)
    yield pool
    pool.close()


def test_a_pool_explains_itself_from_its_descriptor(pool: MemfdPool) -> None:
    store, table = TableStore.format(pool)
    for n in range(5):  # both copies get used
        table.allocate(f"expert/0/{n}", "experts", n + 1)
        store.write(table)
    other = open_pool(os.dup(pool.fd))
    assert other.geometry == GEOMETRY
    assert TableStore(other).read() == table
    assert table.usage()["table"] == table_pages(GEOMETRY)
    other.close()


def test_writing_goes_on_after_the_last_generation(pool: MemfdPool) -> None:
    store, table = TableStore.format(pool)
    table.allocate("a", "kv", 1)
    store.write(table)
    second = TableStore(pool)
    table = second.read()
    table.allocate("b", "kv", 1)
    second.write(table)
    assert second.generation == store.generation + 1
    assert TableStore(pool).read() == table


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_torn_write_leaves_the_table_before_or_after(data: st.DataObject) -> None:
    pool = MemfdBackend().create(GEOMETRY)
    store, table = TableStore.format(pool)
    for n in range(data.draw(st.integers(0, 3))):
        table.allocate(f"old/{n}", "kv", 1 + n)
        store.write(table)
    size = table_pages(GEOMETRY) * GEOMETRY.page_bytes
    before, old = table.copy(), os.pread(pool.fd, size, 0)
    table.allocate("new", "experts", data.draw(st.integers(1, 9)))
    store.write(table)
    new = os.pread(pool.fd, size, 0)
    # Pages of a killed writer reach memory in any order: any mixture of old and new 16-byte words may be found.
    words = [i for i in range(0, size, 16) if old[i : i + 16] != new[i : i + 16]]
    arrived = data.draw(st.sets(st.sampled_from(words)))
    os.pwrite(pool.fd, old, 0)
    for i in arrived:
        os.pwrite(pool.fd, new[i : i + 16], i)
    found = TableStore(pool).read()
    assert found == (table if len(arrived) == len(words) else before)
    assert read_by_pages(pool) == found
    pool.close()


def test_two_damaged_copies_are_an_error(pool: MemfdPool) -> None:
    store, table = TableStore.format(pool)
    store.write(table)
    os.pwrite(pool.fd, b"\xff" * (table_pages(GEOMETRY) * 4096 - 4096), 4096)
    with pytest.raises(OperatorError, match="'store-test': both copies of its page table are damaged"):
        TableStore(pool).read()
    with pytest.raises(OperatorError, match="'store-test': both copies of its page table are damaged"):
        read_by_pages(pool)


@pytest.mark.parametrize("pages", [64, 77, 1000])
@pytest.mark.parametrize("extents", [1, 2, 40])
def test_a_damaged_copy_is_found_out_wherever_the_copies_lie(pages: int, extents: int) -> None:
    """Whatever its header claims; and copies begin and end within pages."""
    pool = MemfdBackend().create(PoolGeometry("lies", pages, 4096))
    store, table = TableStore.format(pool)
    for n in range(extents):
        before = table.copy()
        table.allocate(f"expert/0/{n}", "experts", 1)
        store.write(table)
    assert read_by_pages(pool) == table
    copy_bytes = (16 << 10) + 64 * pages
    header = 4096 + store.generation % 2 * copy_bytes
    whole = os.pread(pool.fd, 28 + 200, header)
    for at, damage in ((0, b"?"), (15, b"\xff"), (16, b"\xff" * 8), (16, bytes(8)), (24, b"??"), (40, b"?")):
        os.pwrite(pool.fd, damage, header + at)
        assert read_by_pages(pool) == TableStore(pool).read() == before
        os.pwrite(pool.fd, whole, header)
    assert read_by_pages(pool) == table
    pool.close()


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("changes", range(5))
def test_a_table_read_while_its_owner_writes_is_none_from_before(pool: MemfdPool, moment: int, changes: int) -> None:
    store, table = TableStore.format(pool)
    for n in range(2):
        table.allocate(f"old/{n}", "kv", 1)
        store.write(table)
    tables, reads = [table.copy()], 0

    def read(offset: int, nbytes: int) -> bytes:
        nonlocal reads
        for n in range(changes if reads == moment else 0):
            table.allocate(f"new/{n}", "kv", 1)
            store.write(table)
            tables.append(table.copy())
        reads += 1
        return os.pread(pool.fd, nbytes, offset)

    assert newest_table(read, GEOMETRY)[1] in tables


def test_a_table_that_does_not_fit_is_refused_and_the_old_one_stays(pool: MemfdPool) -> None:
    store, table = TableStore.format(pool)
    table.allocate("k" * 30_000, "kv", 1)
    with pytest.raises(OperatorError, match="do not fit its page table"):
        store.write(table)
    assert list(store.read().extents) == ["table"]


@pytest.mark.parametrize("page_bytes", [4096, 64 << 10, 2 << 20])
def test_one_extent_per_page_fits(page_bytes: int) -> None:
    pool = MemfdBackend().create(PoolGeometry("many", 700, page_bytes))
    store, table = TableStore.format(pool)
    for n in range(table.usage()["free"]):
        table.allocate(f"loading:expert/{n}/{n}", "exchange", 1)
    store.write(table)
    assert store.read() == table
    pool.close()


def test_a_pool_too_small_for_its_table_is_refused() -> None:
    pool = MemfdBackend().create(PoolGeometry("small", 4, 4096))
    with pytest.raises(OperatorError, match="'small': pages: its table alone needs"):
        TableStore.format(pool)
    pool.close()


def test_a_memfd_that_is_no_pool_is_refused_and_closed() -> None:
    fd = os.memfd_create("other")
    os.ftruncate(fd, 8192)
    with pytest.raises(OperatorError, match="not a page pool"):
        open_pool(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
