"""What is left of a layout without some of its nodes."""

from __future__ import annotations

import random
from dataclasses import replace

from concertina.orchestrator.core.survive import survive
from hypothesis import given
from hypothesis import strategies as st

from .core_layouts import make_layout, random_placement

ORDERS = st.integers(0, 2**32).map(random.Random)
SEATS = st.lists(st.sampled_from("abc"), min_size=1, max_size=6).map(
    lambda nodes: [(f"cpu-{i}", node) for i, node in enumerate(nodes)]
)


@given(SEATS, st.sets(st.sampled_from("abc")), ORDERS)
def test_every_expert_has_a_place_and_those_that_are_left_stay(seats, nodes, order):
    layout = make_layout(seats, "gloo", "separate", random_placement(order, [device for device, _ in seats]))
    left = survive(layout, nodes)
    if not any(node in nodes for _, node in seats):
        assert left is None
        return
    assert [s.device for s in left.seats] == [device for device, node in seats if node in nodes]
    for rank, seat in enumerate(left.seats):  # the placement itself checks that every expert has its replicas
        had = layout.experts_of(layout.devices.index(seat.device))
        assert set(had) <= set(left.experts_of(rank))
    assert left.exchange == ("solo" if len(left.seats) == 1 < len(layout.seats) else layout.exchange)


@given(SEATS, ORDERS)
def test_nothing_changes_if_nothing_is_lost(seats, order):
    layout = make_layout(seats, "gloo", placement=random_placement(order, [device for device, _ in seats]))
    assert survive(layout, {"a", "b", "c", "d"}) is layout


def test_lost_experts_go_to_those_who_have_fewest():
    layout = make_layout([("cpu-0", "a"), ("cpu-1", "a"), ("cpu-2", "b")], "gloo")
    left = survive(layout, {"a"})
    counts = [len(left.experts_of(rank)) for rank in (0, 1)]
    assert sum(counts) == 2 * 3
    assert max(counts) - min(counts) <= 1


def test_too_little_memory_for_what_is_lost():
    layout = make_layout([("cpu-0", "a"), ("cpu-1", "b")], "gloo", "separate")
    tight = replace(layout, memory=replace(layout.memory, device_pages=8))
    assert all(tight.kv_blocks(rank) > 0 for rank in (0, 1))
    assert survive(tight, {"a"}) is None
