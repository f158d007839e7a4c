"""The controller's decisions in a simulated cluster (C2, C4, C9 to C14 and C16), by random histories and faults.

A history follows from its seed. To see one: ``python -m tests.orchestrator.test_simulation SEED``; to run more of
them: ``python -m tests.orchestrator.test_simulation FIRST END``.
"""

from __future__ import annotations

import sys
from typing import get_args

import pytest

from .core_processes import Violation
from .core_schedule import Schedule
from .core_transitions import TRANSITIONS, FaultKind, OneFault

SCHEDULES = 1400
BATCHES = 7


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_histories_end_well(batch: int) -> None:
    for seed in range(batch, SCHEDULES, BATCHES):
        Schedule(seed).play()


def test_without_faults_every_operation_succeeds() -> None:
    for seed in range(150):
        outcomes = {o.outcome for o in Schedule(seed, faults=False).play().state.operations}
        assert outcomes <= {"done", "canceled", "superseded"}, seed


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("fault", get_args(FaultKind))
def test_one_fault_at_every_effect_does_not_keep_an_operation_from_its_end(transition: str, fault: FaultKind) -> None:
    """C14."""
    for mode, lates in (("shared", (False, True)), ("separate", (False,))):
        whole = OneFault(transition, mode).play()
        for late in lates[: 1 if fault.startswith("error") else 2]:
            for at in range(whole.started - whole.began):
                OneFault(transition, mode, fault, at, late=late).play()


def main(numbers: list[int]) -> None:
    """Show one history, or find the seeds of those that go wrong."""
    for seed in range(*numbers) if len(numbers) > 1 else numbers:
        schedule = Schedule(seed)
        try:
            schedule.play()
        except Violation as e:
            print(e)
        if len(numbers) == 1:
            print("\n".join(schedule.log))


if __name__ == "__main__":
    main([int(number) for number in sys.argv[1:]])
