"""What a change would take, before anything is done."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from concertina.orchestrator.cli.preview_view import render
from concertina.orchestrator.core.layout import Layout
from concertina.orchestrator.hands import NodeInfo
from concertina.orchestrator.preview import Preview, preview
from concertina.orchestrator.resize import drained, resized
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from .resize_world import KIB64, MIB, SIZES, context, layout_of

A, B = NodeInfo("node-a", "127.0.0.1", 4, 64 * MIB), NodeInfo("node-b", "10.0.0.2", 4, 64 * MIB)


def text(found: Preview) -> str:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(render(found))
    return capture.get()


def test_on_one_node_nothing_is_copied() -> None:
    planned_for = context()
    current = layout_of(planned_for, 2)
    found = preview(current, resized(current, 3, planned_for))
    assert (found.workers_before, found.workers_after, found.generations) == (2, 3, 1)
    assert found.moved_bytes == sum(d.moved_bytes for d in found.devices) == 0
    assert [d.change for d in found.devices] == ["stays", "stays", "joins"]
    assert sum(d.experts_after for d in found.devices) >= 16
    assert found.devices[2].kv_blocks_before == 0 < found.devices[2].kv_blocks_after
    target = resized(current, 3, planned_for)
    assert preview(current, target, standbys={"node-a": 1}).seconds < 2 < found.seconds, "a process must be started"
    assert preview(current, target, standbys={"node-b": 1}).seconds == found.seconds, "it stands by elsewhere"


def test_memory_of_its_own_takes_in_every_new_expert() -> None:
    planned_for = context(memory_mode="separate", device_memory_bytes=4 * MIB)
    current = layout_of(planned_for, 2)
    target = drained(current, "cpu-1", planned_for)
    found = preview(current, target)
    assert [(d.device, d.change) for d in found.devices] == [("cpu-0", "stays"), ("cpu-1", "leaves")]
    assert found.devices[0].moved_bytes == 8 * SIZES.expert_bytes == found.moved_bytes
    assert found.devices[0].kv_blocks_after < found.devices[0].kv_blocks_before
    for pool in found.pools:
        if pool.pool.startswith("device/"):
            assert pool.peak_pages <= current.memory.device_pages


def test_a_new_node_loads_the_trunk_and_each_expert_once() -> None:
    planned_for = context(A)
    current = layout_of(planned_for, 2)
    target = resized(current, 4, replace(planned_for, nodes=(A, B)))
    found = preview(current, target)
    on_b = {key for rank, seat in enumerate(target.seats) if seat.node == "node-b" for key in target.experts_of(rank)}
    assert found.moved_bytes == len(on_b) * SIZES.expert_bytes + SIZES.trunk_bytes
    assert sum(d.moved_bytes for d in found.devices) == len(on_b) * SIZES.expert_bytes
    assert found.exchange == "gloo"


def test_what_it_would_supersede_is_shown() -> None:
    planned_for = context()
    current = layout_of(planned_for, 2)
    for target in (current, resized(current, 3, planned_for)):
        found = replace(preview(current, target), supersedes="op-3 (scale 2 -> 4 workers)")
        assert "instead of op-3 (scale 2 -> 4 workers), which is under way; behind it once it is committed" in " ".join(
            text(found).split()
        )
        assert "nothing to do" not in text(found)


def test_nothing_to_do() -> None:
    current = layout_of(context(), 2)
    found = preview(current, current)
    assert (found.generations, found.moved_bytes, found.seconds) == (0, 0, 0.0)
    assert text(found) == "2 workers already: nothing to do\n"


@given(st.integers(1, 4), st.integers(1, 4), st.booleans())
@settings(max_examples=8, deadline=None)
def test_peaks_hold_both_layouts(first: int, then: int, separate: bool) -> None:
    mode = "separate" if separate else "shared"
    planned_for = context(memory_mode=mode, device_memory_bytes=4 * MIB)
    current = layout_of(planned_for, first)
    target = resized(current, then, planned_for)
    peaks = {pool.pool: pool.peak_pages for pool in preview(current, target).pools}
    for layout in (current, target):
        for pool in layout.pools if current != target else ():
            assert used(layout, pool) <= peaks[pool] <= layout.pool_pages(pool)
    for pool in peaks if mode == "shared" else ():  # KV yields before the switch: experts are there once
        experts = len(current.placement.replicas_LE) * len(current.placement.replicas_LE[0])
        rest = experts * current.memory.expert_pages + current.memory.trunk_pages
        exchange = current.exchange_pages + target.exchange_pages
        blocks = max(sum(layout.kv_in(pool).values()) for layout in (current, target))
        assert peaks[pool] <= rest + exchange + blocks * current.memory.kv_block_pages


def used(layout: Layout, pool: str) -> int:
    ranks = [rank for rank in range(len(layout.seats)) if layout.device_pool(rank) == pool]
    experts = {key for rank in ranks for key in layout.experts_of(rank)}
    blocks = sum(layout.kv_blocks(rank) for rank in ranks)
    shared = layout.memory.trunk_pages + layout.exchange_pages if pool.startswith("node/") else 0
    return len(experts) * layout.memory.expert_pages + blocks * layout.memory.kv_block_pages + shared


@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_it_is_shown_and_written(mode: str) -> None:
    planned_for = context(A, B, memory_mode=mode, device_memory_bytes=4 * MIB)
    current = layout_of(planned_for, 2)
    found = preview(current, resized(current, 4, planned_for))
    shown = text(found)
    assert "2 -> 4 workers, exchange gloo" in shown
    assert f"about {found.seconds:,.1f} s; nothing was done" in shown
    assert max(map(len, shown.splitlines())) <= 80
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.split()}
    for device in found.devices:
        assert {f"{device.moved_bytes / MIB:.1f}", str(device.kv_blocks_after)} <= set(rows[device.device])
    for pool in found.pools:
        assert f" {pool.peak_pages} " in shown
    assert f"{found.seconds:.1f} s" in shown
    data = json.loads(json.dumps(found.to_dict()))
    assert data["moved_bytes"] == found.moved_bytes
    assert {d["device"] for d in data["devices"]} == {f"cpu-{i}" for i in range(4)}
    assert current.memory.page_bytes == KIB64
