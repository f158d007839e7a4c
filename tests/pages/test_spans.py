"""Spans of a range against a plain list of positions."""

from __future__ import annotations

from typing import Any

from concertina.workers.pages.backend import runs
from concertina.workers.pages.spans import Span, Spans
from hypothesis import given
from hypothesis import strategies as st

POSITIONS = 24
place = st.tuples(st.integers(0, POSITIONS), st.integers(0, POSITIONS)).map(sorted)
step = st.tuples(st.booleans(), place, st.sampled_from("ab"), st.lists(st.integers(0, 40), min_size=POSITIONS))


def expand(spans: list[Span[str]]) -> dict[int, tuple[str, int]]:
    return {span.position + n: (span.pool, span.page + n) for span in spans for n in range(span.count)}


@given(st.lists(step, max_size=12), place)
def test_spans_equal_a_list_of_positions(steps: list[Any], asked: tuple[int, int]) -> None:
    spans: Spans[str] = Spans()
    plain: dict[int, tuple[str, int]] = {}
    for adding, (first, end), pool, pages in steps:
        inside = {at: plain[at] for at in range(first, end) if at in plain}
        assert spans.any(first, end) == bool(inside)
        if not adding:
            assert expand(spans.remove(first, end)) == inside
            plain = {at: entry for at, entry in plain.items() if at not in inside}
        elif not inside:
            at, added = first, []
            for page, count in runs(pages[: end - first]):
                added.append(Span(at, count, pool, page))
                at += count
            spans.add(added)
            plain |= expand(added)
    assert spans.gap(*asked) == next((at for at in range(*asked) if at not in plain), None)
    assert expand(spans.remove(0, POSITIONS)) == plain
    assert not len(spans)


def test_a_whole_pool_is_one_span() -> None:
    spans: Spans[str] = Spans()
    spans.add([Span(0, 1 << 40, "pool", 0)])
    assert spans.gap(5, 1 << 39) is None
    spans.remove(7, 9)
    assert (len(spans), spans.gap(5, 1 << 39)) == (2, 7)
