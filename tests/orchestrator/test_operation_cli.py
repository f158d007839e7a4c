"""The commands that change a deployment, over a controller in memory."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from click.testing import CliRunner, Result
from concertina.errors import InternalError, OperatorError
from concertina.orchestrator import remote
from concertina.orchestrator.api import Deployment
from concertina.orchestrator.cli import main as entry
from concertina.orchestrator.cli import operation_run, operation_view
from concertina.orchestrator.cli.status_view import StatusView
from concertina.orchestrator.remote import Unavailable
from concertina.orchestrator.status import OperationStatus, bar_of
from concertina.orchestrator.tokens import VARIABLE
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from .fake_controller import DONE, RUNNING, TOKEN, FakeController, install


@pytest.fixture(autouse=True)
def _no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, TOKEN)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(entry.cli, arguments)


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ("scale --workers 3", ("scale", 3, False)),
        ("rebalance", ("rebalance",)),
        ("drain cpu-1", ("drain", "cpu-1", None)),
        ("drain cpu-1 --deadline 60s", ("drain", "cpu-1", 60.0)),
        ("drain cpu-1 --deadline 2m", ("drain", "cpu-1", 120.0)),
        ("cancel op-1", ("cancel", "op-1")),
    ],
)
def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch, arguments: str, asked: tuple[Any, ...]) -> None:
    state = replace(DONE, state="canceled") if "cancel" in arguments else DONE
    controller = install(monkeypatch, FakeController(state))
    done = run(*arguments.split(), "--name", "mine")
    assert done.exit_code == 0, done.output
    assert controller.asked == [asked]
    assert "2 -> 3 workers: " in done.output
    assert "after 1.4 s" in done.output


def test_who_asks_to_wait_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller answers at the operation's end, or after ``wait_s``."""
    install(monkeypatch, FakeController(RUNNING))
    given_s: list[float | None] = []

    def ask(call: Callable[[], Any], timeout_s: float | None = None) -> Any:
        given_s.append(timeout_s)
        return call()

    monkeypatch.setattr(remote, "ask", ask)
    Deployment("mine").operation("op-1", 300.0)
    assert given_s[-1] is not None
    assert given_s[-1] > 300.0


@pytest.mark.parametrize("command", ["scale --workers 3 --timeout 5s", "wait"])
def test_a_limit_holds_while_the_controller_is_away(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    install(monkeypatch, FakeController(RUNNING))
    patience_s: list[float] = []

    def away(call: Callable[[], Any], given_s: float) -> Any:
        patience_s.append(given_s)
        if len(patience_s) > (command != "wait"):
            raise Unavailable("it starts again")
        return call()()

    monkeypatch.setattr(remote, "ask_again", away)
    if command == "wait":
        with pytest.raises(Unavailable):
            Deployment("mine").wait("op-1", timeout_s=5.0)
    else:
        assert "it starts again" in str(run(*command.split()).exception)
    assert 4.0 < patience_s[-1] <= 10.0


def test_waiting_shows_phases_and_says_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    forming = replace(RUNNING, phase="forming the generation", bytes_done=8_000_000)
    controller = install(monkeypatch, FakeController(RUNNING, [RUNNING, forming, DONE]))
    done = run("scale", "--workers", "3", "--wait")
    assert done.exit_code == 0, done.output
    assert done.stdout == "2 -> 3 workers: done after 1.4 s, serving after 0.6 s, 8.0 MB moved (operation op-1)\n"
    assert done.stderr.splitlines()[:2] == [
        "2 -> 3 workers: moving weights (2.0 of 8.0 MB)",
        "2 -> 3 workers: forming the generation (8.0 of 8.0 MB)",
    ]
    assert [a[0] for a in controller.asked] == ["scale", "operation", "operation", "operation"]


def test_waiting_says_what_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = replace(RUNNING, phase="clearing up", reason="tried 7 times so far: pages are held")
    install(
        monkeypatch, FakeController(RUNNING, [stuck, stuck, replace(stuck, reason="tried 8 times so far: ..."), DONE])
    )
    done = run("scale", "--workers", "3", "--wait")
    assert [line.partition(" (2.0")[0] for line in done.stderr.splitlines()] == [
        "2 -> 3 workers: moving weights",
        "2 -> 3 workers: clearing up (tried 7 times so far: pages are held)",
        "2 -> 3 workers: clearing up (tried 8 times so far: ...)",
        "2 -> 3 workers",
    ]


def test_a_limit_is_for_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = install(monkeypatch, FakeController(RUNNING))
    done = run("scale", "--workers", "3", "--no-wait", "--timeout", "9s")
    assert done.exit_code == 2
    assert "--timeout waits; expected one of --no-wait and --timeout" in done.output
    assert controller.asked == []


def test_commands_that_are_named_are_about_this_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeController(RUNNING))
    late = run("scale", "--workers", "3", "--timeout", "50ms", "--name", "mine")
    assert "concertina operations --name mine shows how it goes on" in str(late.exception)


def test_a_deployment_that_is_not_there_is_said_before_a_token_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeController(RUNNING))
    monkeypatch.delenv(VARIABLE)
    for arguments in ("scale --workers 3", "rebalance", "drain cpu-1", "undrain a", "cancel op-1"):
        done = run(*arguments.split(), "--name", "mistyped")
        assert str(done.exception) == "name: no deployment called 'mistyped'; none runs in this cluster"


def test_who_commands_starts_no_ray() -> None:
    with pytest.raises(OperatorError, match="address: 'local' would start another Ray; expected that of a running one"):
        remote.connect_to("local")


def test_without_a_terminal_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = install(monkeypatch, FakeController(RUNNING))
    done = run("scale", "--workers", "3")
    assert (done.exit_code, len(controller.asked)) == (0, 1)
    assert done.output == "2 -> 3 workers: under way, moving weights (operation op-1)\n"


@pytest.mark.parametrize("state", ["failed", "canceled", "superseded"])
def test_a_bad_end_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch, state: Any) -> None:
    install(monkeypatch, FakeController(RUNNING, [replace(DONE, state=state, reason="too little memory")]))
    done = run("drain", "cpu-1", "--wait")
    assert done.exit_code == 1
    expected = f"2 -> 3 workers: {state} after 1.4 s (operation op-1): too little memory"
    assert str(done.exception) == expected


def test_a_wait_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeController(RUNNING))
    done = run("scale", "--workers", "3", "--timeout", "50ms")  # which is to wait
    assert isinstance(done.exception, OperatorError)
    assert "under way, moving weights" in str(done.exception)


def test_interrupting_a_wait_leaves_the_operation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = install(monkeypatch, FakeController(RUNNING))

    def interrupted(*args: Any) -> OperationStatus:
        raise KeyboardInterrupt

    monkeypatch.setattr(operation_view, "watch", interrupted)
    done = run("scale", "--workers", "3", "--wait")
    assert done.exit_code == 130
    assert "operation op-1 goes on; until it is committed, concertina cancel op-1 withdraws it" in done.stderr
    assert controller.asked == [("scale", 3, False)]


def test_interrupting_the_request_says_that_it_may_have_been_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> OperationStatus:
        raise KeyboardInterrupt

    install(monkeypatch, FakeController(RUNNING))
    monkeypatch.setattr(Deployment, "drain", interrupted)
    done = run("drain", "cpu-1", "--name", "mine")
    assert (done.exit_code, done.stdout) == (130, "")
    assert "it may have been accepted; concertina operations --name mine shows it" in done.stderr


def test_a_controller_that_stays_away_is_told_with_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeController(RUNNING))

    def away(*args: Any) -> OperationStatus:
        raise Unavailable("it starts again")

    monkeypatch.setattr(operation_view, "watch", away)
    done = run("scale", "--workers", "3", "--wait")
    assert str(done.exception) == "it starts again; operation op-1 goes on: concertina operations"


@pytest.mark.parametrize("error", [ray.exceptions.RaySystemError("lost"), ray.exceptions.LocalRayletDiedError()])
def test_the_end_of_the_cluster_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def ended(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(ray, "get", ended)
    monkeypatch.setattr(ray, "get_actor", ended)
    with pytest.raises(InternalError, match="the Ray cluster does not answer, or has ended"):
        remote.ask(None)
    with pytest.raises(OperatorError, match="the Ray cluster does not answer, or has ended"):
        remote.find_controller("mine")


@pytest.mark.parametrize("command", ["scale --workers 3", "rebalance", "drain cpu-1"])
def test_json(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    install(monkeypatch, FakeController(RUNNING, [DONE]))
    done = run(*command.split(), "--json", "--wait")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == DONE.to_dict()
    install(monkeypatch, FakeController(replace(DONE, state="failed", reason="r")))
    failed = run(*command.split(), "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["reason"] == "r"


def test_a_dry_run_only_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = install(monkeypatch, FakeController())
    done = run("scale", "--workers", "4", "--dry-run")
    assert done.exit_code == 0, done.output
    assert controller.asked == [("scale", 4, True)]
    assert "2 -> 4 workers" in done.output
    assert "nothing was done" in done.output
    written = json.loads(run("scale", "--workers", "4", "--dry-run", "--json").stdout)
    assert (written["workers_before"], written["workers_after"], written["moved_bytes"]) == (2, 4, 0)


def test_operations_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeController())
    shown = run("operations").output
    assert "op-0" in shown
    assert "[no] room" in shown, "a reason is text, not markup"
    assert [o["id"] for o in json.loads(run("operations", "--json").stdout)] == ["op-0", "op-1"]


def test_undrain_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = install(monkeypatch, FakeController())
    assert run("undrain", "node-b").stdout == "node node-b takes workers again\n"
    assert json.loads(run("undrain", "node-b", "--json").stdout) == {"node": "node-b"}
    assert controller.asked == [("undrain", "node-b")] * 2


def test_a_cancel_that_came_too_late_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeController(DONE))
    done = run("cancel", "op-1")
    assert str(done.exception).startswith("too late: 2 -> 3 workers: done")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("scale", "--workers"),
        ("scale --workers 0", "--workers"),
        ("scale --workers many", "--workers"),
        ("drain", "Missing argument 'DEVICE'"),
        ("undrain", "Missing argument 'NODE'"),
        ("drain cpu-1 --deadline soon", "'soon' is not a duration"),
        ("drain cpu-1 --deadline -5s", "--deadline"),
        ("cancel", "Missing argument 'OPERATION'"),
        ("operations --wait", "--wait"),
    ],
)
def test_wrong_usage_ends_with_status_2(arguments: str, says: str) -> None:
    done = run(*arguments.split())
    assert done.exit_code == 2
    assert says in done.output


@pytest.mark.parametrize("command", ["scale --workers 3", "rebalance", "drain cpu-1", "undrain node-b", "cancel op-1"])
def test_tokens_and_names_are_checked(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    controller = install(monkeypatch, FakeController())
    assert "not this deployment's: the one given" in str(run(*command.split(), "--token", "x" * 20).exception)
    assert "no deployment called 'nobody'" in str(run(*command.split(), "--name", "nobody").exception)
    monkeypatch.delenv(VARIABLE)
    assert "token: none for deployment 'concertina'" in str(run(*command.split()).exception)
    assert controller.asked == []


def test_the_api_waits_and_survives_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = install(monkeypatch, FakeController(RUNNING, [RUNNING, DONE], failing=2))
    deployment = Deployment("mine")
    assert deployment.scale(3, wait=True) == DONE
    assert deployment.operations()[-1] == RUNNING
    assert deployment.scale(4, dry_run=True).workers_after == 4
    assert deployment.wait("op-1", timeout_s=0.0) == RUNNING
    controller.failing = 1
    with pytest.raises(Unavailable):  # draining twice is not the same as draining once
        deployment.drain("cpu-1")
    assert deployment.drain("cpu-1", 5.0) == RUNNING
    assert controller.asked[-1] == ("drain", "cpu-1", 5.0)


def test_the_api_takes_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    install(monkeypatch, FakeController())
    assert Deployment("mine", token=TOKEN).rebalance() == DONE
    assert Deployment("mine").status().name == "mine", "looking needs none"
    with pytest.raises(OperatorError, match="token: none"):
        Deployment("mine").rebalance()


def test_an_operation_is_shown_in_the_status() -> None:
    status = FakeController(RUNNING).status()
    shown = _shown(StatusView().render(status, 0.0))
    assert "2 -> 3 workers: under way, moving weights (operation op-1) (2.0 of 8.0 MB)" in " ".join(shown.split())
    failed = replace(status, operations=status.operations[:1])
    assert "[no] room" in _shown(StatusView().render(failed, 0.0))
    done = replace(status, operations=(DONE,), standbys=2)
    assert "operation" not in _shown(StatusView().render(done, 0.0))
    assert "standbys 2" in _shown(StatusView().render(done, 0.0))


def _shown(rendered: Any) -> str:
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(rendered)
    return capture.get()


texts = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S")), max_size=40)


@given(texts, texts, st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 1 << 50))
def test_any_operation_can_be_shown(text: str, reason: str, began_s: float, ended_s: float, moved: int) -> None:
    states = operation_view._STYLES
    for state in states:
        status = replace(RUNNING, text=text, state=state, reason=reason, started_s=began_s, ended_s=ended_s)  # type: ignore[arg-type]
        status = replace(status, bytes_total=moved, bytes_done=moved)
        assert state in operation_view.outcome(status) or state == "running"
        assert "op-1" in _shown(operation_view.operations_table([status]))


def test_ids_and_reasons_are_shown_beside_long_names() -> None:
    drained = replace(DONE, text=f"{'5400336f' * 7}: 2 -> 1 workers", state="failed", reason="too little memory")
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(operation_view.operations_table([drained]))
    lines = capture.get().splitlines()
    assert lines[1].startswith("op-1")
    assert "memory" in capture.get()


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_a_bar_never_ends_before_its_operation(done: int, total: int) -> None:
    shown, of = bar_of(done, total)
    assert shown <= done
    assert of is None or shown < of == total


def test_a_live_terminal_shows_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeController(RUNNING, [DONE]))
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    assert operation_view.watch(Deployment("mine"), RUNNING, console=console) == DONE
    assert "2 -> 3 workers" in console.file.getvalue()  # type: ignore[attr-defined]
    assert operation_run.SecondsType().convert(1.5, None, None) == 1.5
