"""Devices of different memory and speed: who takes part, what each holds, and how a deployment goes between them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from concertina.errors import OperatorError
from concertina.orchestrator.balancer import Balancer
from concertina.orchestrator.config import DeploymentConfig
from concertina.orchestrator.core.layout import Layout
from concertina.orchestrator.core.survive import survive
from concertina.orchestrator.hands import NodeInfo
from concertina.orchestrator.placing import Site
from concertina.orchestrator.planfiles import read_cluster
from concertina.orchestrator.preview import preview
from concertina.orchestrator.resize import drained, placed, resized, route
from concertina.orchestrator.seating import first_seats
from concertina.planners.cluster import Device
from concertina.workers.engine.stats import EngineStats
from concertina.workers.roles import WorkerReport
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from .resize_world import MIB, context, layout_of
from .test_resize import check_layout

FAST = {"kind": "fast", "memory_bytes": 4 * MIB, "flops": 4e10, "bandwidth_bytes_s": 2e10}
SLOW = {"kind": "slow", "memory_bytes": 2 * MIB, "flops": 1e10, "bandwidth_bytes_s": 1e10}
NODES = (NodeInfo("node-a", "127.0.0.1", 4, 64 * MIB), NodeInfo("node-b", "10.0.0.2", 2, 64 * MIB))


def fast(name: str, **fields: Any) -> Device:
    return Device(name, **{**FAST, **fields})


def slow(name: str, **fields: Any) -> Device:
    return Device(name, **{**SLOW, **fields})


def held(layout: Layout) -> dict[str, int]:
    return {seat.device: len(layout.experts_of(rank)) for rank, seat in enumerate(layout.seats)}


def test_a_slow_device_serves_less_and_holds_no_more_than_its_memory() -> None:
    planned_for = context(fleet=(fast("big-0"), slow("small-0")), memory_mode="separate", experts=10)
    layout = layout_of(planned_for, 2)
    check_layout(layout, planned_for)
    assert layout.devices == ("big-0", "small-0")
    experts = held(layout)
    assert experts["big-0"] >= 3 * experts["small-0"]
    pages = [layout.device_pages(seat) for seat in layout.seats]
    assert pages == [64, 32]
    assert [layout.pool_pages(f"device/node-a/{name}") > p for name, p in zip(layout.devices, pages, strict=True)]


devices = st.builds(
    lambda memory, flops, node: {"memory_bytes": memory * MIB // 4, "flops": flops * 1e9, "node": node},
    st.integers(6, 40),
    st.integers(1, 9),
    st.sampled_from(["node0", "node-a", "10.0.0.2"]),
)


@given(
    st.lists(devices, min_size=2, max_size=5), st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(3, 9)
)
@settings(max_examples=25, deadline=None)
def test_any_fleet_goes_from_any_count_to_any_other(fleet: list[Any], sizes: list[int], experts: int) -> None:
    """C6, C7: every device keeps to its own memory, at every step of the way; what does not fit is refused."""
    named = tuple(fast(f"d-{i}", **fields) for i, fields in enumerate(fleet))
    planned_for = context(*NODES, fleet=named, memory_mode="separate", experts=experts, spare_slots=1)
    sizes = [min(size, len(named)) for size in sizes]
    try:
        current = layout_of(planned_for, sizes[0])
    except OperatorError as e:
        assume("memory" in str(e) or "room" in str(e) or "placement" in str(e))
        return
    check_layout(current, planned_for)
    for size in sizes[1:]:
        try:
            target = resized(current, size, planned_for)
            way = route(current, target, planned_for)
        except OperatorError as e:
            assume("memory" in str(e) or "placement" in str(e))
            return
        check_layout(target, planned_for)
        kinds = {d.name: d for d in named}
        pinned = {"node-a": "node-a", "10.0.0.2": "node-b"}
        for seat in target.seats:
            assert seat.kind.flops == kinds[seat.device].flops
            assert pinned.get(kinds[seat.device].node, seat.node) == seat.node
        for old, new in pairwise((current, *way)):
            for rank, seat in enumerate(new.seats):
                before = set(old.experts_of(old.devices.index(seat.device))) if seat.device in old.devices else set()
                both = (before | set(new.experts_of(rank))) if new is not old else set()
                kv = planned_for.length_blocks * new.memory.kv_block_pages
                assert len(both) * new.memory.expert_pages + kv <= new.device_pages(seat)
        for pool in preview(current, target, way).pools:
            if pool.pool.startswith("device/"):
                seats = {s.device: s for layout in (current, *way) for s in layout.seats}
                assert pool.peak_pages <= target.device_pages(seats[pool.pool.rpartition("/")[2]])
        current = target


@pytest.mark.parametrize("experts", [6, 9, 11])
def test_measured_loads_ask_no_device_for_more_than_its_memory(experts: int) -> None:
    """By its speed the fast one would take 8 of 9 hot experts, and has no room for more than 6; those change places."""
    fleet = (fast("big", memory_bytes=2 * MIB), slow("small"))
    planned_for = context(fleet=fleet, memory_mode="separate", experts=experts)
    current = layout_of(planned_for, 2)
    balancer = Balancer(planned_for.spec, 60.0, None, lambda: 0.0)
    hot = [[3000 if e in held_experts(current, "small") else 1000 for e in range(experts)]] * 2
    for steps in (0, 100):
        counts = tuple(tuple(steps * n for n in layer) for layer in hot)
        told = WorkerReport("w", 1, frozenset(), 1, "", stats=EngineStats(steps=steps), counts_LE=counts)
        balancer.observe({"w": told})
    better = balancer.plan(planned_for.site(current.seats), current.placement)
    assert better is not None, balancer.reason
    target = placed(current, better, planned_for)
    check_layout(target, planned_for)
    for old, new in pairwise((current, *route(current, target, planned_for))):
        assert new.lacks_room_after(old) == ""


def held_experts(layout: Layout, device: str) -> set[int]:
    """Of the first layer."""
    return {expert for layer, expert in layout.experts_of(layout.devices.index(device)) if layer == 0}


def test_devices_are_taken_in_order_and_given_up_from_the_end() -> None:
    planned_for = context(fleet=(slow("b"), fast("a"), slow("c")), memory_mode="separate", experts=4)
    current = layout_of(planned_for, 1)
    assert current.devices == ("b",)
    grown = resized(current, 3, planned_for)
    assert grown.devices == ("b", "a", "c")
    assert resized(grown, 2, planned_for).devices == ("b", "a")
    without = drained(grown, "a", planned_for)
    assert without.devices == ("b", "c")
    assert resized(without, 3, planned_for).devices == ("b", "c", "a")


def test_more_than_there_are_is_refused() -> None:
    planned_for = context(fleet=(fast("a"), slow("b")), experts=4)
    with pytest.raises(OperatorError, match="workers: 3; the cluster file lists 2 devices"):
        resized(layout_of(planned_for, 2), 3, planned_for)


def test_a_device_whose_node_is_not_there_is_refused() -> None:
    planned_for = context(fleet=(fast("a"), slow("b", node="elsewhere")), experts=4)
    with pytest.raises(OperatorError, match=r"lists 2 devices; on nodes that are not alive: b \(elsewhere\)"):
        resized(layout_of(planned_for, 1), 2, planned_for)


def test_a_deployment_does_not_start_on_other_devices_than_the_file_says() -> None:
    fleet = (fast("a"), slow("b", node="elsewhere"), slow("c"))
    planned_for = context(fleet=fleet, experts=4, workers=2)
    with pytest.raises(OperatorError, match="device b: its node 'elsewhere' is not alive; alive: node-a"):
        first_seats(planned_for)
    assert [s.device for s in first_seats(context(fleet=fleet[::2], experts=4, workers=2))] == ["a", "c"]


def test_devices_of_nodes_that_left_are_passed_over() -> None:
    fleet = tuple(fast(f"{node}-{i}", node=f"node-{node}") for node in "abc" for i in range(2))
    a, b = NODES
    c = replace(b, id="node-c", host="10.0.0.3")
    everywhere = context(a, b, c, fleet=fleet, memory_mode="separate", experts=4)
    current = layout_of(everywhere, 3)
    assert current.devices == ("a-0", "a-1", "b-0")
    without = drained(current, "node-b", everywhere)
    for later in (replace(everywhere, cordoned=frozenset({"node-b"})), replace(everywhere, nodes=(a, c))):
        assert resized(without, 4, later).devices == ("a-0", "a-1", "c-0", "c-1")
        with pytest.raises(OperatorError, match=r"lists 6 devices; on .*: b-0.*, b-1"):
            resized(without, 5, later)


def test_the_last_of_the_file_goes_first_however_crowded_nodes_are() -> None:
    crowded, roomy = replace(NODES[0], cpus=2), replace(NODES[1], cpus=8)
    fleet = (fast("a", node="node-a"), fast("b", node="node-a"), slow("c", node="node-b"), slow("d", node="node-b"))
    planned_for = context(crowded, roomy, fleet=fleet, memory_mode="separate", experts=4)
    assert resized(layout_of(planned_for, 4), 3, planned_for).devices == ("a", "b", "c")


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=6), st.integers(1, 40))
def test_slots_are_enough_fit_and_follow_the_speed(fleet: list[tuple[int, int]], experts: int) -> None:
    most = max(memory for _, memory in fleet)
    named = tuple(fast(f"d{i}", flops=f * 1e9, memory_bytes=m * MIB) for i, (f, m) in enumerate(fleet))
    planned_for = context(fleet=named, experts=experts)
    inventory = planned_for.config.inventory
    seats = [replace(layout_of_one, device=e.device, kind=e.kind) for e in inventory.entries]
    site = Site(seats, planned_for.spec, room=float(most))
    slots = site.slots_D
    assert all(count <= memory for count, (_, memory) in zip(slots, fleet, strict=True))
    assert sum(slots) >= min(experts, sum(memory for _, memory in fleet))
    free = [(count, f) for count, (f, memory) in zip(slots, fleet, strict=True) if count < memory]
    assert all(a[0] <= b[0] for a in free for b in free if a[1] < b[1])


layout_of_one = layout_of(context(experts=1), 1).seats[0]


def test_what_a_lost_node_held_goes_where_there_is_memory() -> None:
    fleet = (slow("a", node="node-a"), fast("b", node="node-a"), fast("c", node="node-b"))
    planned_for = context(*NODES, fleet=fleet, memory_mode="separate", experts=9)
    layout = layout_of(planned_for, 3)
    left = survive(layout, {"node-a"})
    assert left is not None
    assert left.devices == ("a", "b")
    assert sum(held(left).values()) == 18
    assert held(left)["b"] >= 1.5 * held(left)["a"]
    assert len(left.reserved_experts) == 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"device_memory_bytes": 1}, "device-memory: the cluster file says"),
        ({"workers": 3}, "workers: 3; the cluster file lists 2 devices"),
        ({"fleet": (fast("a b"),)}, "cluster: device 'a b'; expected letters"),
        ({"fleet": (fast("a", memory_bytes=0),)}, "cluster: kind fast: memory: 0; expected more than 0"),
    ],
)
def test_what_a_fleet_cannot_be_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(OperatorError) as error:
        DeploymentConfig("x", **{"fleet": (fast("a"), slow("b")), **fields})
    assert says in str(error.value)


def test_a_cluster_file_is_an_inventory(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "kinds:\n  fast: {memory: 4MiB, flops: 4GFLOP/s, bandwidth: 2GB/s}\n"
        "  slow: {memory: 1MiB, flops: 1GFLOP/s, bandwidth: 1GB/s}\n"
        'devices:\n  - {name: "f{}", kind: fast, count: 2}\n  - {name: s, kind: slow, node: n1}\n'
    )
    config = DeploymentConfig("x", fleet=read_cluster(path).cluster.devices)
    assert config.device_bytes == 4 * MIB
    told = [(e.device, e.kind.name, e.kind.memory_part, e.node) for e in config.inventory.entries]
    assert told == [("f0", "fast", 1.0, ""), ("f1", "fast", 1.0, ""), ("s", "slow", 0.25, "n1")]
