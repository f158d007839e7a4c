"""Who takes over what running sequences of a leaver have, as it leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from concertina.orchestrator.core.leftovers import heirs_at_switch
from concertina.orchestrator.core.state import Pending, Record, Stage, State

from .core_layouts import make_layout

FOUR = {"cpu-0": "a", "cpu-1": "a", "cpu-2": "b", "cpu-3": "b"}


def going(before: dict[str, str], after: dict[str, str], *fresh: str) -> State:
    """From devices by their node to others; a device's worker is called like it, those of ``fresh`` are new."""
    workers = {device: device.replace("cpu", "worker") for device in before}
    records = [
        Record(i, make_layout(list(d.items()), "shared"), tuple(workers.get(n, f"new-{n}") for n in d))
        for i, d in ((1, before), (2, after))
    ]
    return State(serving=records[0], pending=Pending(records[1], Stage.PREPARE))


def only(*devices: str) -> dict[str, str]:
    return {device: FOUR[device] for device in devices}


def test_the_heir_is_on_the_leavers_node_if_anybody_stays_there() -> None:
    assert heirs_at_switch(going(FOUR, only("cpu-0", "cpu-2"))) == {"cpu-1": "worker-0", "cpu-3": "worker-2"}
    heirs = heirs_at_switch(going(FOUR, only("cpu-0", "cpu-1")))
    assert set(heirs) == {"cpu-2", "cpu-3"}
    assert set(heirs.values()) <= {"worker-0", "worker-1"}


def test_several_leavers_are_shared_out() -> None:
    many = {f"cpu-{i}": "a" for i in range(8)}
    heirs = heirs_at_switch(going(many, {f"cpu-{i}": "a" for i in range(2)}))
    assert sorted(heirs.values()) == ["worker-0"] * 3 + ["worker-1"] * 3


def test_nobody_who_comes_anew_is_an_heir() -> None:
    """Clients do not know the way to it yet."""
    assert heirs_at_switch(going(only("cpu-0"), only("cpu-1"))) == {}
    assert heirs_at_switch(going(only("cpu-0", "cpu-2"), only("cpu-1", "cpu-2"))) == {}  # cpu-1 is near, but new


@pytest.mark.parametrize("what", ["nothing serves", "nothing comes", "recovery", "nobody leaves"])
def test_without_a_common_boundary_or_a_leaver_there_is_none(what: str) -> None:
    state = going(only("cpu-0"), FOUR) if what == "nobody leaves" else going(FOUR, only("cpu-0"))
    assert state.pending is not None
    changed = {
        "nothing serves": replace(state, serving=None),
        "nothing comes": replace(state, pending=None),
        "recovery": replace(state, pending=replace(state.pending, recovery=True)),
        "nobody leaves": state,
    }
    assert heirs_at_switch(changed[what]) == {}
