"""Invariants P1 (no page in two extents), P2 (no page lost) and P3 (a refused operation changes nothing)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from concertina.errors import InternalError, OperatorError
from concertina.workers.pages.backend import runs
from concertina.workers.pages.table import Extent, PageTable
from hypothesis import given, settings
from hypothesis import strategies as st

POOL = 24
KEYS = ("trunk", "expert/0/1", "expert/0/2", "kv/w0", "kv/w1", "exchange/gen1")
PURPOSE = {"trunk": "trunk", "expert": "experts", "kv": "kv", "exchange": "exchange"}

key_st = st.sampled_from(KEYS)
op_st = st.one_of(
    st.tuples(st.just("allocate"), key_st, st.integers(0, 14)),
    st.tuples(st.just("extend"), key_st, st.integers(0, 14)),
    st.tuples(st.just("trim"), key_st, st.lists(st.integers(0, 13), max_size=6)),
    st.tuples(st.just("free"), key_st),
    st.tuples(st.just("rename"), key_st, key_st),
    st.tuples(st.just("move"), key_st, key_st, st.lists(st.integers(0, 13), max_size=6)),
)


def purpose_of(key: str) -> Any:
    return PURPOSE[key.split("/")[0]]


def apply(table: PageTable, op: tuple[Any, ...]) -> None:
    name, key, *rest = op
    if name == "allocate":
        table.allocate(key, purpose_of(key), rest[0])
    elif name == "extend":
        before = table.extents[key].pages if key in table.extents else ()
        pages = table.extend(key, purpose_of(key), rest[0]).pages
        assert (pages[: len(before)], len(pages)) == (before, len(before) + rest[0])
    elif name == "trim":
        before = table.extent(key).pages
        gone = {before[i % len(before)] for i in rest[0]}
        assert table.trim(key, gone).pages == tuple(page for page in before if page not in gone)
    elif name == "free":
        table.free(key)
    elif name == "rename":
        table.rename(key, rest[0], purpose_of(rest[0]))
    else:
        pages = table.extent(key).pages
        table.move_pages(key, [pages[i % len(pages)] for i in rest[1]], rest[0], purpose_of(rest[0]))


def check(table: PageTable) -> None:
    used = [page for extent in table.extents.values() for page in extent.pages]
    free = [page for first, count in table.free_runs for page in range(first, first + count)]
    assert sorted(used + free) == list(range(POOL))
    assert table.free_runs == runs(free)
    usage = table.usage()
    assert sum(usage.values()) == POOL
    assert usage["free"] == len(free)
    for purpose in ("table", "trunk", "experts", "kv", "exchange"):
        pages = [len(e.pages) for e in table.extents.values() if e.purpose == purpose]
        assert usage[purpose] == sum(pages)
    assert all(key == e.key and e.pages for key, e in table.extents.items())


@given(st.lists(op_st, max_size=40))
@settings(max_examples=300, deadline=None)
def test_every_page_belongs_to_exactly_one_extent_or_is_free(ops: list[tuple[Any, ...]]) -> None:
    """P1, P2, P3."""
    table = PageTable(POOL)
    table.allocate("table", "table", 2)
    for op in ops:
        before = table.to_dict(), table.free_runs
        try:
            apply(table, op)
        except (InternalError, OperatorError):
            assert (table.to_dict(), table.free_runs) == before
        check(table)
    again = PageTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again == table
    assert again.free_runs == table.free_runs


@given(st.lists(op_st, max_size=20), st.integers(1, POOL))
@settings(deadline=None)
def test_allocation_takes_as_few_runs_as_free_space_allows(ops: list[tuple[Any, ...]], wanted: int) -> None:
    table = PageTable(POOL)
    for op in ops:
        try:
            apply(table, op)
        except (InternalError, OperatorError):
            continue
    sizes = sorted((count for _, count in table.free_runs), reverse=True)
    if wanted > sum(sizes):
        with pytest.raises(OperatorError, match="out of pages"):
            table.allocate("new", "kv", wanted)
        return
    fewest = next(n for n in range(1, len(sizes) + 1) if sum(sizes[:n]) >= wanted)
    twin = table.copy()
    extent = table.allocate("new", "kv", wanted)
    assert len(runs(extent.pages)) == fewest
    assert twin.allocate("new", "kv", wanted) == extent


def test_out_of_pages_says_for_what_how_many_and_what_is_left() -> None:
    table = PageTable(8)
    table.allocate("trunk", "trunk", 3)
    with pytest.raises(OperatorError, match=r"experts extent 'e' wants 6, 5 of 8 are free \(in use: trunk 3\)"):
        table.allocate("e", "experts", 6)


def test_moved_pages_keep_their_order_and_an_empty_extent_disappears() -> None:
    table = PageTable(8)
    table.allocate("kv/w0", "kv", 5)
    assert table.move_pages("kv/w0", [3, 1], "kv/w1", "kv") == Extent("kv/w1", "kv", (3, 1))
    assert table.extent("kv/w0").pages == (0, 2, 4)
    table.move_pages("kv/w0", [4, 0, 2], "kv/w1", "kv")
    assert table.extent("kv/w1").pages == (3, 1, 4, 0, 2)
    assert "kv/w0" not in table.extents


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda t: t.allocate("trunk", "trunk", 1), "'trunk' exists already"),
        (lambda t: t.allocate("x", "weights", 1), "purpose: expected one of .* got 'weights'"),
        (lambda t: t.allocate("x", "kv", 0), "pages: expected at least 1, got 0"),
        (lambda t: t.free("nothing"), "no extent 'nothing'"),
        (lambda t: t.free("table"), "its own pages cannot be freed"),
        (lambda t: t.rename("table", "mine"), "keep key and purpose"),
        (lambda t: t.rename("trunk", "table", "table"), "exists already"),
        (lambda t: t.move_pages("trunk", [0], "kv/w0", "kv"), "cannot take pages"),
        (lambda t: t.move_pages("trunk", [2, 2], "kv/w0", "kv"), "cannot take pages"),
        (lambda t: t.move_pages("trunk", [2], "trunk", "trunk"), "cannot move"),
        (lambda t: t.move_pages("table", [0], "kv/w0", "kv"), "cannot move"),
        (lambda t: t.extend("trunk", "kv", 1), r"'trunk' \(trunk\) cannot be extended as kv"),
        (lambda t: t.extend("table", "table", 1), "cannot be extended"),
        (lambda t: t.extend("x", "weights", 1), "purpose: expected one of"),
        (lambda t: t.extend("trunk", "trunk", 0), "pages: expected at least 1, got 0"),
        (lambda t: t.trim("trunk", [0]), "cannot free 1 pages of it"),
        (lambda t: t.trim("table", [0]), "cannot free"),
        (lambda t: t.trim("nothing", [0]), "no extent 'nothing'"),
    ],
)
def test_impossible_operations_are_refused(operation: Any, message: str) -> None:
    table = PageTable(8)
    table.allocate("table", "table", 2)
    table.allocate("trunk", "trunk", 3)
    before = table.copy()
    with pytest.raises(InternalError, match=message):
        operation(table)
    assert table == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pages": 4}, "extents"),
        ({"pages": 4, "extents": [["a", "kv", [0, 2]], ["b", "kv", [1, 1]]]}, "two extents claim one page"),
        ({"pages": 4, "extents": [["a", "kv", [3, 2]]]}, "outside 0..3"),
        ({"pages": 4, "extents": [["a", "kv", [3]]]}, "expected"),
        ({"pages": 4, "extents": [["a", "things", [0, 1]]]}, "purpose"),
        ({"pages": 4, "extents": [["a", "kv", [0, 1]], ["a", "kv", [1, 1]]]}, "exists already"),
    ],
)
def test_a_malformed_table_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        PageTable.from_dict(data)
