from __future__ import annotations

import pytest
from concertina.errors import InternalError
from concertina.workers.pages.sizing import choose_page_bytes, pack, pages_for
from hypothesis import given
from hypothesis import strategies as st

KIB, MIB = 1 << 10, 1 << 20
CHOICES = [64 * KIB << i for i in range(6)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], 2 * MIB),
        ([2 * MIB] * 8, 2 * MIB),
        ([3 * MIB] * 8, MIB),  # 2 MiB pages would waste a third
        ([31 * MIB] * 8, 2 * MIB),  # 1 of 31
        ([96 * KIB] * 8, 128 * KIB),  # as wasteful as 64 KiB pages, and larger
        ([10 * KIB] * 8, 64 * KIB),
        ([400 * MIB, 300 * KIB], 2 * MIB),  # small extents count by their bytes
    ],
)
def test_the_largest_page_that_wastes_at_most_an_eighth(sizes: list[int], expected: int) -> None:
    assert choose_page_bytes(sizes) == expected


@given(st.lists(st.integers(0, 9 * MIB), min_size=1, max_size=8))
def test_the_choice_follows_the_rule(sizes: list[int]) -> None:
    def waste(page: int) -> int:
        return sum(pages_for(size, page) * page - size for size in sizes if size)

    chosen = choose_page_bytes(sizes)
    larger = [page for page in CHOICES if page > chosen]
    if waste(chosen) * 8 <= sum(sizes):
        assert all(waste(page) * 8 > sum(sizes) for page in larger)
    else:
        assert all(waste(page) * 8 > sum(sizes) for page in CHOICES)
        assert waste(chosen) == min(map(waste, CHOICES))
        assert all(waste(page) > waste(chosen) for page in larger)


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(InternalError, match="-1"):
        choose_page_bytes([4, -1])


@given(st.lists(st.integers(0, 300), max_size=8), st.sampled_from([1, 2, 64]))
def test_packed_items_are_aligned_apart_and_tight(sizes: list[int], align: int) -> None:
    offsets, total = pack(sizes, align)
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    assert all(offset % align == 0 for offset in offsets)
    assert all(0 <= start - end < align for start, end in zip(offsets, [0, *ends], strict=False))
    assert total == (ends[-1] if ends else 0)
