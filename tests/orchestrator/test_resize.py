"""From one layout to another: what stays, what is refused, and ways through tight memory."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from concertina.errors import OperatorError
from concertina.orchestrator.core.layout import Layout
from concertina.orchestrator.hands import NodeInfo
from concertina.orchestrator.planning import Context
from concertina.orchestrator.preview import preview
from concertina.orchestrator.resize import drained, named_devices, rebalanced, resized, route
from concertina.orchestrator.room import node_use
from concertina.planners.cluster import Device
from concertina.planners.model import Loads
from hypothesis import given, settings
from hypothesis import strategies as st

from .resize_world import KIB64, MIB, context, layout_of

A, B = NodeInfo("node-a", "127.0.0.1", 4, 64 * MIB), NodeInfo("node-b", "10.0.0.2", 2, 64 * MIB)


def check_layout(layout: Layout, planned_for: Context) -> None:
    """What every layout must keep; the placement's own rules are checked when it is made."""
    assert layout.placement.devices == layout.devices
    assert len(set(layout.devices)) == len(layout.seats)
    assert (layout.placement.layers, layout.placement.experts) == (planned_for.spec.layers, planned_for.spec.experts)
    for rank, seat in enumerate(layout.seats):
        assert layout.kv_blocks(rank) >= planned_for.length_blocks
        used = len(layout.experts_of(rank)) * layout.memory.expert_pages
        assert used + layout.kv_blocks(rank) * layout.memory.kv_block_pages <= layout.device_pages(seat)
    available = {node.id: node.available_bytes for node in planned_for.nodes}
    for node in layout.nodes:
        assert sum(node_use(layout, node).values()) * layout.memory.page_bytes <= available[node]
    kinds = {"solo": 1, "shared": len(layout.seats), "gloo": len(layout.seats)}
    assert len(layout.seats) == kinds[layout.exchange]
    assert (layout.exchange_pages > 0) == (layout.exchange == "shared")


counts = st.integers(1, 5)


@given(
    counts, st.lists(counts, min_size=1, max_size=3), st.booleans(), st.booleans(), st.integers(5, 9), st.integers(0, 4)
)
@settings(max_examples=10, deadline=None)
def test_any_count_to_any_other(
    first: int, others: list[int], two_nodes: bool, separate: bool, experts: int, spare: int
) -> None:
    """C6: every expert is placed, devices stay where they are, names do not repeat, budgets hold."""
    planned_for = context(
        *((A, B) if two_nodes else (A,)),
        experts=experts,
        spare_slots=spare,
        memory_mode="separate" if separate else "shared",
        device_memory_bytes=4 * MIB,
    )
    current = layout_of(planned_for, first)
    check_layout(current, planned_for)
    for workers in others:
        target = resized(current, workers, planned_for)
        check_layout(target, planned_for)
        assert len(target.seats) == workers
        kept = [seat for seat in current.seats if seat in target.seats]
        assert len(kept) == min(workers, len(current.seats))
        assert list(target.seats[: len(kept)]) == kept
        assert target.memory.page_bytes == current.memory.page_bytes
        for pool in set(target.pools) & set(current.pools):
            if pool.startswith("node/"):
                assert target.pool_pages(pool) == current.pool_pages(pool)
        if workers == len(current.seats):
            assert target is current
        current = target


@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_new_devices_take_the_lowest_free_names_and_most_cores(mode: Any) -> None:
    planned_for = context(A, B, memory_mode=mode, device_memory_bytes=4 * MIB)
    current = layout_of(planned_for, 3)
    assert Counter(seat.node for seat in current.seats) == {"node-a": 2, "node-b": 1}
    without = drained(current, "cpu-1", planned_for)
    assert without.devices == ("cpu-0", "cpu-2")
    back = resized(without, 4, planned_for)
    assert back.devices == ("cpu-0", "cpu-2", "cpu-1", "cpu-3")
    assert Counter(seat.node for seat in back.seats) == {"node-a": 3, "node-b": 1}


def test_the_most_crowded_node_gives_seats_up_the_highest_number_first() -> None:
    planned_for = context(A, B)
    current = layout_of(planned_for, 6)  # cpu-0..3 on node-a (4 cores), cpu-4, cpu-5 on node-b (2)
    grown = resized(current, 8, planned_for)
    assert resized(grown, 6, planned_for).seats == current.seats
    fewer = resized(current, 3, planned_for)
    assert Counter(seat.node for seat in fewer.seats) == {"node-a": 2, "node-b": 1}
    assert "cpu-0" in fewer.devices


def test_ten_comes_after_nine() -> None:
    planned_for = context(experts=12, exchange="gloo")
    assert resized(layout_of(planned_for, 11), 10, planned_for).devices == tuple(f"cpu-{i}" for i in range(10))


def test_a_node_that_is_gone_keeps_no_devices() -> None:
    planned_for = context(A, B)
    current = layout_of(planned_for, 3)
    alone = replace(planned_for, nodes=(A,))
    assert drained(current, "node-b", alone).nodes == ("node-a",)
    for workers in (2, 3, 4):
        target = resized(current, workers, alone)
        assert (target.nodes, len(target.seats)) == (("node-a",), workers)
        check_layout(target, alone)
    assert drained(current, "cpu-0", alone).devices == ("cpu-1",), "a notice may come while a loss is recovered"
    with pytest.raises(OperatorError, match="no device would be left"):
        drained(current, "node-a", alone)


def test_a_node_that_has_all_devices_gives_way_to_others() -> None:
    planned_for = context(A, B)
    current = layout_of(replace(planned_for, nodes=(A,)), 2)
    target = drained(current, "node-a", planned_for)
    assert [seat.node for seat in target.seats] == ["node-b", "node-b"]
    assert not set(target.devices) & set(current.devices)


def test_draining_the_only_node_or_device_that_is_left_names_a_way_out() -> None:
    planned_for = context(A, B)
    current = layout_of(replace(planned_for, nodes=(A,)), 2)
    with pytest.raises(OperatorError, match="no device would be left; start another one first"):
        drained(layout_of(planned_for, 1), "cpu-0", planned_for)
    for context_of in (replace(planned_for, nodes=(A,)), replace(planned_for, cordoned=frozenset({"node-b"}))):
        with pytest.raises(OperatorError, match="no other node can take workers: let one join, or undrain one"):
            drained(current, "node-a", context_of)


def test_few_experts_move() -> None:
    """One that stays keeps nearly all: 8 experts, 2 layers, from 4 devices to 3 moves only what cpu-3 had."""
    planned_for = context()
    current = layout_of(planned_for, 4)
    target = drained(current, "cpu-3", planned_for)
    moved = sum(
        len(set(target.experts_of(rank)) - set(current.experts_of(current.devices.index(seat.device))))
        for rank, seat in enumerate(target.seats)
    )
    assert moved <= len(current.experts_of(3)) + 2


@given(st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_rebalancing_keeps_devices_and_ends(workers: int, seed: int) -> None:
    """C8: once the loads have what they want, the same loads want nothing else."""
    planned_for = context(spare_slots=2)
    current = layout_of(planned_for, workers)
    assert rebalanced(current, planned_for) is current, "even loads, even placement"
    loads = np.random.default_rng(seed).pareto(1.0, (2, 8)) * 100 + 1
    skewed = replace(planned_for, loads=Loads(loads))
    better = rebalanced(current, skewed)
    check_layout(better, skewed)
    assert better.seats == current.seats
    assert rebalanced(better, skewed) is better


@pytest.mark.parametrize(
    ("workers", "fields", "says"),
    [
        (0, {}, "workers: 0; expected at least 1"),
        (-2, {}, "workers: -2"),
        (17, {"device_memory_bytes": 4 * MIB}, "memory: 17 workers need"),
        (1, {"device_memory_bytes": 3 * MIB // 2}, "device-memory: 1.5 MiB of cpu-0 do not hold 16 experts"),
        (40, {}, "device-memory"),
    ],
)
def test_what_cannot_be_names_need_and_limit(workers: int, fields: dict[str, Any], says: str) -> None:
    planned_for = context(**fields)
    current = layout_of(planned_for, 3)
    with pytest.raises(OperatorError, match=re.escape(says)) as refused:
        resized(current, workers, planned_for)
    if "MiB" in str(refused.value):
        assert len(re.findall(r"\d+\.\d MiB", str(refused.value))) >= 2, "what is needed, and what there is"


def test_experts_count_once_per_node_where_memory_is_shared() -> None:
    """6 devices of 4 MiB are 24 MiB; but the experts, of which every device has some, are there once."""
    small = NodeInfo("node-a", "127.0.0.1", 4, 23 * MIB)
    fields: dict[str, Any] = {"device_memory_bytes": 4 * MIB, "exchange": "gloo", "spare_slots": 8}
    shared, separate = context(small, **fields), context(small, memory_mode="separate", **fields)
    assert len(resized(layout_of(shared, 2), 6, shared).seats) == 6
    with pytest.raises(OperatorError, match=r"memory: 6 workers need .* of node node-a \(experts"):
        resized(layout_of(separate, 2), 6, separate)


def test_a_node_of_unknown_memory_is_not_checked_and_gets_many_addresses() -> None:
    unknown = context(NodeInfo("node-a", "127.0.0.1", 4, 0), device_memory_bytes=4 * MIB)
    layout = layout_of(unknown, 2)
    assert layout.pool_pages("node/node-a") == 1 << 20
    assert len(resized(layout, 17, unknown).seats) == 17


def test_a_pool_has_addresses_for_all_that_its_node_holds() -> None:
    planned_for = context(A, B)
    layout = layout_of(planned_for, 2)
    more = layout.pool_pages("node/node-a") - layout.needed_pages("node/node-a")
    assert more * layout.memory.page_bytes == 2 * 64 * MIB


def test_experts_and_kv_that_meet_on_a_node_fit_it() -> None:
    """One memory for the devices of a node: of two nodes one is left, whose pool had half of the experts so far."""
    nodes = [NodeInfo(f"node-{name}", name, 2, 64 * MIB) for name in "ab"]
    planned_for = context(*nodes, experts=64, layers=4, device_memory_bytes=28 * MIB)
    current = layout_of(planned_for, 4)
    assert Counter(seat.node for seat in current.seats) == {"node-a": 2, "node-b": 2}
    roomy = replace(planned_for, nodes=tuple(replace(node, available_bytes=256 * MIB) for node in nodes))
    target = drained(current, "node-b", roomy)
    pool = "node/node-a"
    both = len(current.experts_in(pool) | target.experts_in(pool)) * current.memory.expert_pages
    kv = sum(target.kv_coming_from(current, pool).values()) * current.memory.kv_block_pages
    most = max(
        len(at.experts_in(pool)) * at.memory.expert_pages + sum(at.kv_in(pool).values()) * at.memory.kv_block_pages
        for at in (current, target)
    )
    assert both + kv <= most, "KV gives way to experts that come"


def test_kv_that_grows_once_old_experts_are_gone_is_not_counted_beside_them() -> None:
    nodes = [NodeInfo(f"node-{name}", name, 2, 64 * MIB) for name in "ab"]
    planned_for = context(nodes[0], experts=32, layers=5, device_memory_bytes=29 * MIB)
    current = layout_of(planned_for, 2)
    both = replace(planned_for, nodes=tuple(nodes))
    assert len(resized(current, 4, both).seats) == 4


def test_a_cluster_file_without_further_devices_says_what_would_have_to_leave() -> None:
    nodes = [NodeInfo(f"node-{name}", "127.0.0.1", 2, 64 * MIB) for name in "ab"]
    fleet = tuple(Device(f"d{i}", "k", 8 * MIB, 1e9, 1e9) for i in range(3))
    planned_for = context(*nodes, fleet=fleet)
    current = layout_of(planned_for, 3)
    gone = [seat.device for seat in current.seats if seat.node == "node-b"]
    cordoned = replace(planned_for, cordoned=frozenset({"node-b"}))
    says = f"lists 3 devices; that would have to leave first: {', '.join(gone)} (--workers {3 - len(gone)} before)"
    with pytest.raises(OperatorError, match=re.escape(says)):
        resized(current, 3, cordoned)


def test_the_pool_of_a_node_that_joins_is_as_large_as_that_node_may_need() -> None:
    """However large the nodes were at the start; and a pool keeps its size, whatever is on its node."""
    small, large = (
        NodeInfo(f"node-{name}", name, cpus, mib * MIB) for name, cpus, mib in (("s", 1, 16), ("l", 16, 256))
    )
    planned_for = context(small, device_memory_bytes=6 * MIB)
    alone = layout_of(planned_for, 1)
    both = replace(planned_for, nodes=(small, large))
    most = resized(alone, 20, both)
    assert most.pool_pages("node/node-l") * most.memory.page_bytes >= 2 * 256 * MIB
    assert most.pool_pages("node/node-s") == alone.pool_pages("node/node-s")
    fewer = resized(most, 3, both)
    assert fewer.started == most.started
    assert len(resized(fewer, 20, both).seats) == 20


def test_a_pool_that_is_there_does_not_grow() -> None:
    planned_for = context(exchange="gloo")
    layout = layout_of(planned_for, 2)
    small = replace(layout, started=(("node-a", layout.needed_pages("node/node-a")),))
    with pytest.raises(OperatorError, match=r"memory: pool node/node-a would need \d+ pages and was started with \d+"):
        resized(small, 3, replace(planned_for, config=replace(planned_for.config, exchange="auto")))


def test_shared_memory_that_does_not_reach_is_refused() -> None:
    planned_for = context(A, exchange="shared")
    current = layout_of(planned_for, 2)
    with pytest.raises(OperatorError, match="exchange: shared memory does not reach across 2 nodes"):
        resized(current, 5, replace(planned_for, nodes=(A, NodeInfo("node-b", "b", 8, 64 * MIB))))


@pytest.mark.parametrize(
    ("name", "left"),
    [("cpu-1", 2), ("node-b", 2), ("10.0.0.2", 2), ("node-a", 1)],
)
def test_draining_a_device_or_a_node(name: str, left: int) -> None:
    planned_for = context(A, B)
    target = drained(layout_of(planned_for, 3), name, planned_for)
    assert len(target.seats) == left
    assert name not in (*target.devices, *target.nodes)
    check_layout(target, planned_for)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cpu-7", "drain: no device or node is called 'cpu-7'; devices: cpu-0, cpu-1, cpu-2; nodes: node-a, node-b"),
        ("", "drain: no device or node is called ''"),
        ("node", "drain: 2 nodes are called 'node'"),
        ("nod", "drain: no device or node"),
    ],
)
def test_draining_what_is_not_there(name: str, says: str) -> None:
    planned_for = context(A, B)
    with pytest.raises(OperatorError, match=re.escape(says)):
        drained(layout_of(planned_for, 3), name, planned_for)


def test_devices_that_are_leaving_can_still_be_named() -> None:
    planned_for = context(A, B)
    current = layout_of(planned_for, 3)
    (on_b,) = (seat.device for seat in current.seats if seat.node == "node-b")
    without = drained(current, on_b, planned_for)
    leaving = replace(planned_for, leavers={on_b: "node-b", "cpu-9": "node-b"})
    assert drained(without, on_b, leaving) == without
    assert named_devices(without, on_b, leaving) == {on_b}
    assert named_devices(current, "node-b", leaving) == named_devices(without, "10.0.0.2", leaving) == {on_b, "cpu-9"}


def test_the_last_device_is_not_drained() -> None:
    planned_for = context()
    with pytest.raises(OperatorError, match=r"without cpu-0 no device would be left; .*scale --workers 2"):
        drained(layout_of(planned_for, 1), "cpu-0", planned_for)


def _on_a_device(layouts: tuple[Layout, ...], device: str) -> set[tuple[int, int]]:
    return {
        key for layout in layouts if device in layout.devices for key in layout.experts_of(layout.devices.index(device))
    }


def check_route(current: Layout, target: Layout, planned_for: Context) -> int:
    """Each pair of neighbours fits every device beside a sequence of full length. Returns the number of steps."""
    way = route(current, target, planned_for)
    assert way[-1] is target
    memory = target.memory
    for pair in pairwise((current, *way)):
        for device in {device for layout in pair for device in layout.devices}:
            together = len(_on_a_device(pair, device)) * memory.expert_pages
            assert together + planned_for.length_blocks * memory.kv_block_pages <= memory.device_pages
        for layout in pair:
            check_layout(layout, planned_for)
    for between in way[:-1]:
        assert set(between.devices) == set(current.devices) | set(target.devices)
    return len(way)


@given(st.integers(2, 4), st.integers(2, 4), st.integers(0, 3), st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_a_route_never_exceeds_a_device(workers: int, others: int, slack: int, seed: int) -> None:
    """C7: where memory is a device's own and tight, several generations lead there; each transition fits."""
    slots = -(-8 // min(workers, others))
    pages = (2 * slots + slack) * 2 + 4  # two layers of experts, and a sequence of four blocks
    planned_for = context(memory_mode="separate", device_memory_bytes=pages * KIB64, exchange="gloo")
    current = layout_of(planned_for, workers)
    skewed = replace(planned_for, loads=Loads(np.random.default_rng(seed).pareto(1.0, (2, 8)) * 100 + 1))
    target = resized(current, others, skewed) if others != workers else rebalanced(current, skewed)
    if slack:  # one spare place anywhere is enough
        check_route(current, target, skewed)
        return
    with suppress(OperatorError):
        check_route(current, target, skewed)


def test_tight_memory_takes_several_generations_and_roomy_memory_one() -> None:
    """Two devices exchange half of their experts, with room for one more each."""
    tight = context(memory_mode="separate", device_memory_bytes=(2 * 4 + 1) * 2 * KIB64 + 4 * KIB64, exchange="gloo")
    current = layout_of(tight, 2)
    swapped = [[(rs[0],) for rs in layer] for layer in current.placement.replicas_LE]
    for layer in swapped:
        on = [next(e for e, (r,) in enumerate(layer) if r.device == d) for d in (0, 1)]
        layer[on[0]], layer[on[1]] = layer[on[1]], layer[on[0]]
    placement = replace(current.placement, replicas_LE=tuple(map(tuple, swapped)))
    target = replace(current, placement=placement)
    assert check_route(current, target, tight) > 1
    assert preview(current, target, route(current, target, tight)).generations > 1
    roomy = context(memory_mode="separate", device_memory_bytes=4 * MIB, exchange="gloo")
    current = layout_of(roomy, 2)
    assert route(current, replace(current, placement=placement), roomy) == (replace(current, placement=placement),)


def test_one_pool_of_a_node_always_goes_at_once() -> None:
    planned_for = context()
    current = layout_of(planned_for, 2)
    target = resized(current, 4, planned_for)
    assert route(current, target, planned_for) == (target,)


def test_drained_nodes_get_no_devices_and_keep_none() -> None:
    """A device that moves to another node is another device: its name is not used while the old one is there."""
    nodes = [NodeInfo(f"node-{name}", "127.0.0.1", 2, 64 * MIB) for name in "ab"]
    planned_for = context(*nodes)
    current = layout_of(planned_for, 3)
    assert set(current.nodes) == {"node-a", "node-b"}
    cordoned = replace(planned_for, cordoned=frozenset({"node-b"}))
    moved = resized(current, 3, cordoned)
    assert moved.nodes == ("node-a",)
    assert not {seat.device for seat in moved.seats} & {s.device for s in current.seats if s.node == "node-b"}
    assert drained(drained(current, "node-b", planned_for), "node-b", cordoned).nodes == ("node-a",)
    with pytest.raises(OperatorError, match=r"workers: 4; every node is drained \(node-a, node-b\)"):
        resized(current, 4, replace(planned_for, cordoned=frozenset({"node-a", "node-b"})))
