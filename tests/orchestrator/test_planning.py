"""From a configuration and nodes to a layout, and the arithmetic of memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from concertina.errors import OperatorError
from concertina.orchestrator.config import DeploymentConfig, EngineOptions
from concertina.orchestrator.core.layout import Seat
from concertina.orchestrator.hands import NodeInfo
from concertina.orchestrator.planning import exchange_kind, fitting_placement, max_model_len, plan_layout
from concertina.orchestrator.seating import seat_workers
from concertina.orchestrator.sizing import MemoryLimits, ModelSizes, plan_memory
from concertina.planners.placement import balanced_placement
from concertina.workers.model_files import ModelFiles
from hypothesis import given
from hypothesis import strategies as st

from ..checkpoints import FAMILIES, make_checkpoint

GIB = 1 << 30
HERE = NodeInfo("here", "127.0.0.1", 2, GIB)
THERE = NodeInfo("there", "10.0.0.2", 6, 2 * GIB)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe")))


@pytest.fixture(scope="module")
def model(checkpoint: str) -> ModelFiles:
    return ModelFiles.open(checkpoint)


@given(st.lists(st.integers(1, 16), min_size=1, max_size=5), st.integers(1, 20))
def test_workers_sit_in_proportion_to_cores(cores: list[int], workers: int) -> None:
    nodes = [NodeInfo(f"n{i}", "h", c, GIB) for i, c in enumerate(cores)]
    seats = seat_workers(nodes, workers)
    assert [s.device for s in seats] == [f"cpu-{i}" for i in range(workers)]
    taken = {n.id: sum(s.node == n.id for s in seats) for n in nodes}
    for a in nodes:
        for b in nodes:  # nobody would have more cores per worker by sitting elsewhere
            assert taken[a.id] == 0 or a.cpus / taken[a.id] >= b.cpus / (taken[b.id] + 1)


def test_no_node_no_seat() -> None:
    with pytest.raises(OperatorError, match="no node is alive"):
        seat_workers([], 1)


@pytest.mark.parametrize(
    ("asked", "nodes", "kind"),
    [
        ("auto", ["a"], "solo"),
        ("gloo", ["a"], "solo"),
        ("auto", ["a", "a"], "shared"),
        ("shared", ["a", "a"], "shared"),
        ("gloo", ["a", "a"], "gloo"),
        ("auto", ["a", "b"], "gloo"),
    ],
)
def test_exchange_kind(asked: Any, nodes: list[str], kind: str) -> None:
    seats = [Seat(f"cpu-{i}", node) for i, node in enumerate(nodes)]
    assert exchange_kind(DeploymentConfig("x", exchange=asked), seats) == kind


def test_shared_memory_does_not_reach_other_nodes() -> None:
    with pytest.raises(OperatorError, match="exchange: shared memory does not reach across 2 nodes"):
        exchange_kind(DeploymentConfig("x", exchange="shared"), [Seat("cpu-0", "a"), Seat("cpu-1", "b")])


def test_a_length_beyond_the_positions_is_refused(model: ModelFiles) -> None:
    assert max_model_len(DeploymentConfig("x"), model) == 1024
    assert max_model_len(DeploymentConfig("x", engine=EngineOptions(max_model_len=7)), model) == 7
    with pytest.raises(OperatorError, match="max-model-len: 1025"):
        max_model_len(DeploymentConfig("x", engine=EngineOptions(max_model_len=1025)), model)


def test_a_placement_file_takes_the_seats_names(tmp_path: Path, model: ModelFiles) -> None:
    placement = balanced_placement(["a", "b"], 3, 7)
    path = tmp_path / "p.json"
    for document in (placement.to_dict(), {**placement.to_dict(), "objective": 1}):
        path.write_text(json.dumps(document))
        read = fitting_placement(str(path), [Seat("cpu-0", "n"), Seat("cpu-1", "n")], model)
        assert read.devices == ("cpu-0", "cpu-1")
        assert read.replicas_LE == placement.replicas_LE


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "p.json"),
        ("[", "p.json"),
        ("[1]", "p.json"),
        ("{}", "p.json"),
        ('{"devices": ["a"], "layers": [[[]]]}', "layer 0, expert 0: no replica"),
        (json.dumps(balanced_placement(["a"], 3, 7).to_dict()), "is for 1 devices"),
        (json.dumps(balanced_placement(["a", "b"], 3, 6).to_dict()), "6 experts"),
    ],
)
def test_a_bad_placement_file_is_named(tmp_path: Path, model: ModelFiles, text: str | None, says: str) -> None:
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OperatorError, match=re.escape(says)):
        fitting_placement(str(path), [Seat("cpu-0", "n"), Seat("cpu-1", "n")], model)


SIZES = ModelSizes(expert_bytes=100_000, trunk_bytes=300_000, kv_block_bytes=65_536)


def limits(devices: int = 2, **fields: Any) -> MemoryLimits:
    given: dict[str, Any] = {
        "reserved_experts": (0,) * devices,
        "memory_parts": (1.0,) * devices,
        "device_bytes": None,
        "available_bytes": GIB,
        "devices_per_node": 2,
        "kv_blocks_wanted": 50,
        "kv_blocks_needed": 10,
    }
    return MemoryLimits(**{**given, **fields})


def test_memory_by_hand() -> None:
    """20 experts of 2 pages and 50 blocks of 1 are wanted, and fit."""
    plan = plan_memory(SIZES, 65_536, balanced_placement(["a", "b"], 2, 10), limits())
    assert (plan.expert_pages, plan.kv_block_pages, plan.trunk_pages) == (2, 1, 5)
    assert plan.device_pages == 20 * 2 + 50
    assert plan.kv_blocks(10, plan.device_pages) == 70
    assert plan.kv_blocks(1000, plan.device_pages) == 0


@given(st.integers(0, 1 << 24), st.integers(1, 4), st.integers(1, 64))
def test_memory_fits_or_is_refused_with_the_reason(device_bytes: int, devices: int, needed: int) -> None:
    placement = balanced_placement([f"d{i}" for i in range(devices)], 2, 7)
    try:
        plan = plan_memory(
            SIZES, 65_536, placement, limits(devices, device_bytes=device_bytes, kv_blocks_needed=needed)
        )
    except OperatorError:
        held = max(sum(len(layer[d]) for layer in placement.experts_LD) for d in range(devices))
        assert device_bytes // 65_536 < held * 2 + needed
        return
    assert plan.device_pages * plan.page_bytes <= device_bytes
    for device in range(devices):
        held = sum(len(layer[device]) for layer in placement.experts_LD)
        assert plan.kv_blocks(held, plan.device_pages) >= needed


def test_automatic_sizing_leaves_the_node_most_of_its_memory() -> None:
    plan = plan_memory(SIZES, 65_536, balanced_placement(["a", "b"], 2, 10), limits(kv_blocks_wanted=1 << 30))
    assert 0.3 * GIB < 2 * plan.device_pages * plan.page_bytes <= 0.4 * GIB


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_a_layout_holds_what_it_must(checkpoint: str, model: ModelFiles, workers: int) -> None:
    layout = plan_layout(DeploymentConfig(checkpoint, workers), model, [HERE], lambda: 0.0)
    assert len(layout.seats) == workers
    assert (layout.exchange_pages > 0) == (layout.exchange == "shared") == (workers > 1)
    assert layout.placement.experts == 7
    for pool, requests in layout.extents(1).items():
        assert layout.pool_pages(pool) >= sum(r.pages for r in requests)
    for rank in range(workers):
        assert layout.kv_blocks(rank) * 16 >= 1024


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_a_placement(tmp_path: Path, family: str) -> None:
    """Shared experts count too, in every layer: a model of several layers must fit itself."""
    path = str(make_checkpoint(family, tmp_path, num_hidden_layers=5))
    for workers in (1, 2, 4):
        layout = plan_layout(DeploymentConfig(path, workers), ModelFiles.open(path), [HERE, THERE], lambda: 0.0)
        counts = [len(layout.experts_of(rank)) for rank in range(workers)]
        assert sum(counts) >= len(ModelFiles.open(path).config.moe_layers) * layout.placement.experts


def test_two_nodes_meet_through_gloo(checkpoint: str, model: ModelFiles) -> None:
    layout = plan_layout(DeploymentConfig(checkpoint, 4), model, [HERE, THERE], lambda: 0.0)
    assert layout.exchange == "gloo"
    assert layout.exchange_pages == 0
    assert {s.node for s in layout.seats} == {"here", "there"}
