"""Physical pages and ranges. P5: mapped pages are never freed. P6: a range lives as long as its last view."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from concertina.errors import InternalError, OperatorError
from concertina.workers.pages.backend import PoolGeometry, runs
from concertina.workers.pages.holds import PagesHeld
from concertina.workers.pages.memfd import MemfdBackend, MemfdPool, map_pages
from concertina.workers.pages.ranges import HUGE_BYTES, MemfdRange
from concertina.workers.pages.views import view
from hypothesis import given
from hypothesis import strategies as st

PAGE = 4096


@pytest.fixture
def pool() -> Iterator[MemfdPool]:
    """Sixteen pages, each filled with its number."""
    pool = MemfdBackend().create(PoolGeometry("memfd-test", 16, PAGE))
    for page in range(16):
        os.pwrite(pool.fd, bytes([page]) * PAGE, page * PAGE)
    yield pool
    pool.close()


def mappings_of(mapped: MemfdRange) -> list[str]:
    """Permissions of the kernel's mappings inside a range, in order; reserved ones are ``---p``."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, permissions = line.split()[:2]
        start, end = (int(x, 16) for x in where.split("-"))
        if start < mapped.address + mapped.nbytes and end > mapped.address:
            found.append(permissions)
    return found


@given(st.lists(st.integers(0, 9)))
def test_runs_are_the_same_pages_in_the_same_order(pages: list[int]) -> None:
    found = runs(pages)
    assert [page for first, count in found for page in range(first, first + count)] == pages
    assert all(a[0] + a[1] != b[0] for a, b in pairwise(found))


def test_a_range_reads_and_writes_the_pages_in_the_given_order(pool: MemfdPool) -> None:
    order = [3, 4, 5, 1, 9, 0]
    mapped = map_pages(pool, order)
    assert [mapped.memory(i * PAGE, 1)[0] for i in range(6)] == order
    mapped.memory(4 * PAGE, 2)[:] = b"zz"
    assert os.pread(pool.fd, 3, 9 * PAGE) == b"zz\x09"


def test_adjacent_pages_share_one_mapping_and_the_rest_is_fenced(pool: MemfdPool) -> None:
    mapped = MemfdRange(8, PAGE)
    mapped.map(1, pool, [3, 4, 5, 9], writable=False)
    assert mappings_of(mapped) == ["---p", "r--s", "r--s", "---p"]
    mapped.unmap(0, 8)
    assert mappings_of(mapped) == ["---p"]


def test_addresses_and_file_offsets_agree_modulo_a_huge_page() -> None:
    for first_page in (0, 5, 511, 512, 700):
        assert (MemfdRange(3, PAGE, first_page).address - first_page * PAGE) % HUGE_BYTES == 0


def test_a_pool_can_neither_shrink_nor_grow(pool: MemfdPool) -> None:
    for size in (PAGE, 99 * PAGE):
        with pytest.raises(OSError, match="not permitted") as caught:
            os.ftruncate(pool.fd, size)
        assert caught.value.errno == errno.EPERM


def test_freed_pages_give_memory_back_and_read_as_zeros(pool: MemfdPool) -> None:
    before = pool.resident_bytes()
    pool.free([2, 3, 7])
    assert pool.resident_bytes() == before - 3 * PAGE
    assert [os.pread(pool.fd, 1, page * PAGE)[0] for page in (1, 2, 3, 7, 8)] == [1, 0, 0, 0, 8]


def test_mapped_pages_are_not_freed(pool: MemfdPool) -> None:
    """P5."""
    mapped = map_pages(pool, [4, 5])
    with pytest.raises(PagesHeld, match="'memfd-test': still mapped"):
        pool.free([3, 4])
    assert os.pread(pool.fd, 1, 3 * PAGE) == b"\x03"
    pool.free([3])
    mapped.unmap(0, 1)
    pool.free([4])
    with pytest.raises(PagesHeld):
        pool.free([5])
    del mapped
    pool.free([5])


def test_a_page_mapped_twice_is_held_until_the_second_goes(pool: MemfdPool) -> None:
    mapped = MemfdRange(3, PAGE)
    mapped.map(0, pool, [6])
    mapped.map(2, pool, [6])
    mapped.unmap(0, 1)
    with pytest.raises(PagesHeld):
        pool.free([6])
    mapped.unmap(2, 1)
    pool.free([6])


def test_pages_being_freed_cannot_be_mapped(pool: MemfdPool) -> None:
    freeing = pool.holds()
    assert freeing.claim([6])
    mapped = MemfdRange(2, PAGE)
    with pytest.raises(PagesHeld):
        mapped.map(0, pool, [5, 6])
    freeing.close()
    mapped.map(0, pool, [5, 6])


def test_a_range_lives_exactly_as_long_as_its_last_view(pool: MemfdPool) -> None:
    """P6; also after the range and the pool's descriptor are gone."""
    mapped = map_pages(pool, [7, 2])
    twin = MemfdBackend().import_pool([os.dup(pool.fd)], pool.geometry)
    tensor = view(mapped, torch.uint8, (2, PAGE))
    part = tensor[1, 8:12].view(torch.int32)
    del mapped, tensor
    pool.close()
    gc.collect()
    assert part.tolist() == [0x02020202]
    with pytest.raises(PagesHeld):
        twin.free([7])
    del part
    twin.free([7, 2])
    twin.close()


def test_views_have_dtype_shape_strides_and_offset(pool: MemfdPool) -> None:
    mapped = map_pages(pool, [0, 1])
    flat = view(mapped, torch.int16, (PAGE,))
    flat.copy_(torch.arange(PAGE))
    assert view(mapped, torch.int16, (2, 3), byte_offset=64).tolist() == [[32, 33, 34], [35, 36, 37]]
    strided = view(mapped, torch.int16, (2, 2), byte_offset=4, strides=(2048, 3))
    assert strided.tolist() == [[2, 5], [2050, 2053]]
    assert view(mapped, torch.bfloat16, (0, 5)).shape == (0, 5)
    assert view(mapped, torch.int16, ()).item() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (2 * PAGE + 1,)}, "outside its 8192 bytes"),
        ({"shape": (8,), "byte_offset": -4}, "outside"),
        ({"shape": (2, 2), "strides": (5000, 4000)}, "outside"),
        ({"shape": (2, 2), "strides": (5,)}, "do not fit shape"),
        ({"shape": (2,), "strides": (-1,)}, "do not fit shape"),
        ({"shape": (PAGE + 1,)}, "position 1 is not mapped"),
    ],
)
def test_views_outside_mapped_pages_are_refused(pool: MemfdPool, arguments: dict[str, object], message: str) -> None:
    mapped = MemfdRange(2, PAGE)
    mapped.map(0, pool, [3])
    with pytest.raises(InternalError, match=message):
        view(mapped, torch.uint8, **arguments)  # type: ignore[arg-type]


def test_a_misaligned_view_is_refused(pool: MemfdPool) -> None:
    with pytest.raises(InternalError, match="byte_offset 2 is no multiple of 4"):
        view(map_pages(pool, [3]), torch.float32, (2,), byte_offset=2)


def test_pages_are_copied_between_pools(pool: MemfdPool) -> None:
    backend = MemfdBackend()
    other = backend.create(PoolGeometry("other", 4, PAGE))
    backend.copy(pool, [9, 3, 4], other, [2, 0, 3])
    assert [os.pread(other.fd, 1, page * PAGE)[0] for page in range(4)] == [3, 0, 9, 4]
    backend.copy(pool, [], other, [])
    with pytest.raises(InternalError, match="1 sources for 2 targets"):
        backend.copy(pool, [1], other, [1, 2])
    other.close()


def test_impossible_mappings_are_refused(pool: MemfdPool) -> None:
    mapped = MemfdRange(4, PAGE)
    mapped.map(1, pool, [3])
    small = MemfdBackend().create(PoolGeometry("large-pages", 2, 2 * PAGE))
    for position, source, pages, message in (
        (3, pool, [1, 2], "positions 3..4 outside 0..3"),
        (-1, pool, [1], "outside"),
        (0, pool, [16], "outside 0..15"),
        (0, pool, [-1], "outside 0..15"),
        (0, pool, [1, 2], "already mapped"),
        (0, small, [1], "pages have 4096 bytes"),
    ):
        with pytest.raises(InternalError, match=message):
            mapped.map(position, source, pages)
    assert mappings_of(mapped) == ["---p", "rw-s", "---p"]
    pool.free([1, 2])  # refused mappings hold nothing
    small.close()
    with pytest.raises(InternalError, match="'large-pages': closed"):
        MemfdRange(1, 2 * PAGE).map(0, small, [0])
    with pytest.raises(InternalError, match="at least 1, got 0"):
        map_pages(pool, [])


@pytest.mark.parametrize(("pages", "page_bytes"), [(0, 4096), (4, 2048), (4, 5000), (4, 0)])
def test_impossible_geometries_are_refused(pages: int, page_bytes: int) -> None:
    with pytest.raises(OperatorError, match="'bad': page"):
        PoolGeometry("bad", pages, page_bytes)


def test_descriptors_that_are_no_sealed_pool_are_refused(tmp_path: Path, pool: MemfdPool) -> None:
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 2 * PAGE)
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(plain, 2 * PAGE)
    backend = MemfdBackend()
    for fds, pages, message in (
        ([unsealed], 2, "not sealed against shrinking"),
        ([unsealed], 3, "expected 12288 bytes, found 8192"),
        ([plain], 2, "not a memfd"),
        ([], 2, "expected 1 descriptor"),
    ):
        with pytest.raises(OperatorError, match=message):
            backend.import_pool(fds, PoolGeometry("bad", pages, PAGE))
    os.close(unsealed)
    os.close(plain)


def test_populating_enters_pages_without_changing_them(pool: MemfdPool) -> None:
    writer = map_pages(pool, [3, 1])
    writer.memory()[:] = bytes(range(256)) * (writer.nbytes // 256)
    mapped = map_pages(pool, [3, 1], writable=False)
    before = pool.resident_bytes()
    assert mapped.populate()
    assert pool.resident_bytes() == before
    assert bytes(mapped.memory()) == bytes(writer.memory())
