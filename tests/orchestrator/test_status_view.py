"""The status as people see it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from concertina.orchestrator.cli.status_view import StatusView
from concertina.orchestrator.status import DeploymentStatus, PoolStatus, WorkerStatus
from concertina.workers.protocol import EngineLoad
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

PURPOSES = {"experts": 100, "trunk": 20, "kv": 300, "exchange": 4, "table": 2, "free": 74}


def worker(rank: int, **fields: Any) -> WorkerStatus:
    load = EngineLoad(waiting=2, running=5, kv_blocks_used=30, kv_blocks=120)
    found = WorkerStatus(rank, f"cpu-{rank}", "node-a", 100 + rank, "serving", (3, 4, 3), load, 1000, 500, 60, 7)
    return replace(found, **fields)


def deployment(*workers: WorkerStatus, **fields: Any) -> DeploymentStatus:
    pools = (PoolStatus("node/abcdefghijkl", "node-a", 1 << 20, sum(PURPOSES.values()), PURPOSES),)
    found = DeploymentStatus(
        "mine", "tiny", "http://127.0.0.1:8000", 3, "serving", "shared", "bfloat16", 3, 7, 75.0, workers, pools
    )
    return replace(found, **fields)


def text(status: DeploymentStatus, view: StatusView | None = None, now_s: float = 0.0, width: int = 80) -> str:
    console = Console(width=width, force_terminal=False, file=io.StringIO())
    with console.capture() as capture:
        console.print((view or StatusView()).render(status, now_s))
    return capture.get()


def row(shown: str, first: str) -> list[str]:
    (line,) = [line for line in shown.splitlines() if line.startswith(first)]
    return line.split()


def test_what_it_shows() -> None:
    shown = text(deployment(worker(0), worker(1, routed_tokens=180, experts_per_layer=(4, 4, 4))))
    assert "generation 3" in shown
    assert "3 MoE layers x 7 experts" in shown
    expected = ["cpu-0", "serving", "3-4", "25%", "5+2", "25%", "120", "1000", "500", "-"]
    assert row(shown, "cpu-0") == expected
    assert row(shown, "cpu-1")[2:4] == ["4", "75%"]
    pages = [float(cell.replace(",", "")) for cell in row(shown, "node abcdefgh")[2:]]
    assert pages == [100.0, 20.0, 300.0, 4.0]  # in use; what is free is only addresses


def test_drained_nodes_are_named() -> None:
    assert "drained nodes, which get no workers: abcdefgh" in text(deployment(worker(0), cordoned=("abcdefghijkl",)))


def test_emulated_step_times_are_not_taken_for_real() -> None:
    emulated = deployment(worker(0), emulated_step_ms=15.0)
    assert "step times are emulated: at least 15 ms" in text(emulated)
    assert emulated.to_dict()["emulated_step_ms"] == 15.0
    assert "emulated" not in text(deployment(worker(0)))


def test_rates_are_since_the_last_look() -> None:
    view = StatusView()
    assert row(text(deployment(worker(0)), view, 10.0), "cpu-0")[-1] == "-"
    assert row(text(deployment(worker(0, generated_tokens=700)), view, 12.0), "cpu-0")[-1] == "100"
    assert row(text(deployment(worker(0, generated_tokens=0)), view, 13.0), "cpu-0")[-1] == "0"
    assert row(text(deployment(worker(0, generated_tokens=9)), view, 13.0), "cpu-0")[-1] == "-"


def test_a_failure_is_shown() -> None:
    shown = text(deployment(worker(0, state="failed"), phase="failed", detail="worker 0: its process ended"))
    assert "failed" in shown
    assert "worker 0: its process ended" in shown


@pytest.mark.parametrize("workers", [[], [worker(0, experts_per_layer=(), load=EngineLoad(), routed_tokens=0)]])
def test_nothing_yet(workers: list[WorkerStatus]) -> None:
    assert "mine" in text(deployment(*workers, pools=()))


@pytest.mark.parametrize(
    ("n", "shown"), [(9_999, "9999"), (10_000, "10.0k"), (999_949, "999.9k"), (999_950, "1.0M"), (10**11, "100.0G")]
)
def test_counts_are_short(n: int, shown: str) -> None:
    assert row(text(deployment(worker(0, prompt_tokens=n))), "cpu-0")[7] == shown


numbers = st.integers(0, 10**11)


@given(numbers, numbers, numbers, st.integers(0, 999), st.integers(0, 10**6), st.sampled_from(["serving", "preparing"]))
@example(0, 999_950, 999_950_000, 0, 999_999, "preparing")  # what rounds to a thousand of its unit
@settings(max_examples=50, deadline=None)
def test_it_fits_80_columns(prompt: int, generated: int, routed: int, busy: int, blocks: int, state: str) -> None:
    load = EngineLoad(busy, busy, blocks, blocks)
    fields: dict[str, Any] = {"prompt_tokens": prompt, "generated_tokens": generated, "routed_tokens": routed}
    shown = text(deployment(worker(0, load=load, state=state, **fields), worker(1, node="node-b")), width=200)
    tables = shown.split("Workers")[1]
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= 80


def test_json_has_everything() -> None:
    found = json.loads(json.dumps(deployment(worker(0)).to_dict()))
    assert found["workers"][0]["experts_per_layer"] == [3, 4, 3]
    assert sum(found["pools"][0]["by_purpose"].values()) == found["pools"][0]["pages"]
