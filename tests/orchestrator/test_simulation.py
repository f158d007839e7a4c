"""The controller's decisions in a simulated cluster (C2, C4, C9 to C14 and C16), by random histories and faults.

A history follows from its seed. To see one: ``python -m tests.orchestrator.test_simulation SEED``; to run more of
them: ``python -m tests.orchestrator.test_simulation FIRST END``. One that goes wrong says how to see it again, with
``--no-faults`` where it had none; one fault in one transition is named by its words (``grow shared 'worker dies' 7``).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from concertina.orchestrator.core.facts import Commit, Snapshot
from concertina.orchestrator.core.layout import MemoryMode
from concertina.orchestrator.core.state import State
from concertina.orchestrator.core.step import Decision
from concertina.orchestrator.preview import preview

from . import core_schedule
from .core_processes import Violation
from .core_schedule import Schedule
from .core_transitions import ACROSS_NODES, TRANSITIONS, FaultKind, OneFault

SCHEDULES = 2100
BATCHES = 7
FAULTS = [fault for fault in get_args(FaultKind) if fault != "node dies"]


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_histories_end_well(batch: int) -> None:
    for seed in range(batch, SCHEDULES, BATCHES):
        Schedule(seed).play()


def test_without_faults_every_operation_succeeds() -> None:
    for seed in range(150):
        outcomes = {o.outcome for o in Schedule(seed, faults=False).play().state.operations}
        assert outcomes <= {"done", "canceled", "superseded"}, seed


@pytest.mark.parametrize("transition", [*TRANSITIONS, *ACROSS_NODES])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_at_every_effect_does_not_keep_an_operation_from_its_end(transition: str, fault: FaultKind) -> None:
    """C14."""
    for mode, lates in (("shared", (False, True)), ("separate", (False,))):
        at_every_effect(transition, mode, fault, lates[: 1 if fault.startswith("error") else 2])


@pytest.mark.parametrize("transition", ACROSS_NODES)
@pytest.mark.parametrize("mode", get_args(MemoryMode))
def test_a_node_lost_at_every_effect_leaves_one_generation_that_serves(transition: str, mode: MemoryMode) -> None:
    at_every_effect(transition, mode, "node dies", (False, True))


def at_every_effect(transition: str, mode: MemoryMode, fault: FaultKind, lates: Sequence[bool]) -> None:
    whole = OneFault(transition, mode).play()
    for late in lates:
        for at in range(whole.started - whole.began):
            OneFault(transition, mode, fault, at, late=late).play()


@pytest.mark.parametrize("transition", [*TRANSITIONS, *ACROSS_NODES])
@pytest.mark.parametrize("mode", get_args(MemoryMode))
def test_as_many_pages_are_in_use_as_a_dry_run_says(transition: str, mode: MemoryMode) -> None:
    """At most, of every pool that is there afterwards."""
    played = OneFault(transition, mode).play()
    said = {pool.pool: pool.peak_pages for pool in preview(*played.way).pools}
    assert {name: pool.most for name, pool in played.world.owners.items()} == {
        name: said[name] for name in played.world.owners
    }


@pytest.mark.parametrize("seed", [3, 4])
def test_what_goes_wrong_is_told_with_its_seed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same seed goes wrong in the same way."""
    real = core_schedule.step

    def forgetful(state: State, snapshot: Snapshot) -> Decision:
        decision = real(state, snapshot)
        return replace(decision, effects=tuple(e for e in decision.effects if not isinstance(e, Commit)))

    monkeypatch.setattr(core_schedule, "step", forgetful)
    said = []
    for _ in range(2):
        with pytest.raises(Violation) as caught:
            Schedule(seed).play()
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert said[0].startswith(f"seed {seed}: ")
    assert said[0].endswith(f"python -m tests.orchestrator.test_simulation {seed}")


def test_a_history_follows_from_its_seed() -> None:
    """Also in another process, where strings have other hashes."""
    script = "from tests.orchestrator.test_simulation import traces; print(traces(range(40)))"
    seen = set()
    for number in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": number}
        seen.add(subprocess.check_output([sys.executable, "-c", script], cwd=Path(__file__).parents[2], env=env))
    assert len(seen) == 1


def traces(seeds: Iterable[int]) -> list[str]:
    """Digests of histories."""
    return [hashlib.sha256("\n".join(Schedule(seed).play().log).encode()).hexdigest()[:16] for seed in seeds]


def main(arguments: Sequence[str]) -> None:
    """Show one history, or find the seeds of those that go wrong."""
    faults, words = "--no-faults" not in arguments, [word for word in arguments if word != "--no-faults"]
    if not words[0].isdigit():
        transition, mode, fault, at, *late = words
        show(OneFault(transition, mode, fault, int(at), late=bool(late)))  # type: ignore[arg-type]
    elif len(words) == 1:
        show(Schedule(int(words[0]), faults=faults))
    else:
        for seed in range(*map(int, words)):
            try:
                Schedule(seed, faults=faults).play()
            except Violation as e:
                print(e)


def show(schedule: Schedule) -> None:
    try:
        schedule.play()
    except Violation as e:
        print(e)
    print("\n".join(schedule.log))


if __name__ == "__main__":
    main(sys.argv[1:])
