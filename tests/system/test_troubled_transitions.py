"""Transitions under load where memory is tight, time is short, or the controller dies (S3). See `under_load`."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from concertina.errors import OperatorError
from concertina.orchestrator.core.facts import Commit, Effect, Fill, Free, HandOver, Prepare, ResizeKV

from .crew import Member, restart
from .under_load import (
    LIMIT_S,
    MODES,
    NAMES,
    Load,
    busy_on_the_first,
    cleared,
    everyone_has_some,
    settled,
    strike_at,
    under_load,
    until,
)

pytestmark = pytest.mark.ray  # several processes
# At which growing from 2 to 3 and shrinking from 3 to 2 the controller dies, in turn.
STEPS: tuple[type[Effect], ...] = (Fill, HandOver, Prepare, Prepare, Commit, Commit, ResizeKV, Free)
TIGHT_BYTES = (
    12 + 16
) << 16  # a device that holds 12 of 21 experts and one sequence of full length, in pages of 64 KiB


@pytest.mark.parametrize("mode", ["replicas", "separate"])
def test_a_controller_that_dies_at_any_step_of_a_transition_goes_on(
    checkpoint: Path, members: list[Member], mode: str
) -> None:
    """As an effect of each kind begins, or a moment after; its successor reaches the target."""

    async def go() -> None:
        choose = random.Random(f"controller {mode}")
        async with under_load(members, checkpoint, rebalance_s=0.0, **MODES[NAMES.index(mode)]) as load:
            size = 2
            for effect in STEPS:
                size = 5 - size
                await settled(load, 5 - size)
                begun = asyncio.Event()
                struck = strike_at(load, effect, begun.set)
                operation = await load.deployment.controller.scale(load.token, size)
                await asyncio.wait_for(begun.wait(), LIMIT_S)
                struck()
                await asyncio.sleep(choose.choice((0.0, 0.0, choose.uniform(0.0, 0.05))))
                await restart(load.deployment)
                ended = await load.deployment.controller.operation(load.token, operation.id, LIMIT_S)
                assert ended.state == "done", ended
                await settled(load, size)
                await cleared(load)

    asyncio.run(go())


@pytest.mark.parametrize("memory", ["shared", "separate"])
def test_fewer_experts_are_more_kv(checkpoint: Path, members: list[Member], memory: str) -> None:
    """On each worker that stays, as the status has it; and back."""

    async def go() -> None:
        fields = {"memory_mode": memory, "device_memory_bytes": 2 << 20, "rebalance_s": 0.0}
        async with under_load(members, checkpoint, **fields) as load:
            blocks = []
            for size in (2, 4, 2):
                await scaled(load, size)
                blocks.append({w.device: w.load.kv_blocks for w in (await settled(load, size)).workers})
            few, many, again = blocks
            assert all(many[device] > few[device] for device in few), blocks
            assert again == few

    asyncio.run(go())


async def scaled(load: Load, size: int) -> None:
    controller = load.deployment.controller
    operation = await controller.scale(load.token, size)
    ended = await controller.operation(load.token, operation.id, LIMIT_S)
    assert ended.state == "done", ended
    await settled(load, size)
    await cleared(load)


def test_tight_memory_takes_several_generations_and_refuses_what_does_not_fit(
    checkpoint: Path, members: list[Member]
) -> None:
    async def go() -> None:
        fields = {"memory_mode": "separate", "device_memory_bytes": TIGHT_BYTES, "rebalance_s": 0.0}
        async with under_load(members, checkpoint, **fields) as load:
            controller = load.deployment.controller
            before = (await settled(load, 2)).generation
            with pytest.raises(OperatorError, match="device-memory"):
                await controller.scale(load.token, 1)
            assert (await settled(load, 2)).generation == before
            generations: list[int] = []
            for _ in range(3):
                busy_on_the_first(controller)
                operation = await controller.rebalance(load.token)
                generations.append(len(controller._state.operations[-1].route))
                ended = await controller.operation(load.token, operation.id, LIMIT_S)
                assert ended.state == "done", ended
                await settled(load, 2)
                await cleared(load)
            assert max(generations) > 1, generations

    asyncio.run(go())


@pytest.mark.parametrize("deadline_s", [0.0, 0.02])
def test_a_drain_whose_time_runs_out_loses_nothing_but_time(
    checkpoint: Path, members: list[Member], deadline_s: float
) -> None:
    """What has not been handed over by then is computed again."""

    async def go() -> None:
        async with under_load(members, checkpoint, workers=3, memory_mode="separate", rebalance_s=0.0) as load:
            controller: Any = load.deployment.controller
            for device in ("cpu-1", "cpu-0"):
                await until(lambda: everyone_has_some(load))
                operation = await controller.drain(load.token, device, deadline_s)
                ended = await controller.operation(load.token, operation.id, LIMIT_S)
                assert ended.state == "done", ended
                left = await settled(load, 2 if device == "cpu-1" else 1)
                assert device not in {worker.device for worker in left.workers}
                await cleared(load)

    asyncio.run(go())
