"""Real workers in processes of their own, a real controller and router: random transitions and kills under load (S3).

Every stream is greedy in float32; its tokens must be those of a run in which nothing happened.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGSTOP
from typing import Any

import numpy as np
import pytest
from concertina.errors import OperatorError
from concertina.orchestrator import kv_deeds
from concertina.orchestrator.core import attempts
from concertina.orchestrator.core.facts import Commit, Effect, Fill, Free, HandOver, Prepare, ResizeKV
from concertina.orchestrator.deeds import Deeds
from concertina.orchestrator.preview import preview
from concertina.orchestrator.status import OperationStatus

from .crew import Member
from .under_load import (
    LIMIT_S,
    MODES,
    NAMES,
    Load,
    begun,
    busy_on_the_first,
    cleared,
    everyone_has_some,
    settled,
    strike_at,
    taken_in,
    under_load,
    until,
)

pytestmark = pytest.mark.ray  # several processes
FIRST = (4, 1, 4)  # sizes, and then
TRANSITIONS = 8  # random ones in each mode: 32 in all, and 12 given ones
STRIKES = ["worker"] * 6 + ["both"] * 2 + ["hang", "owner"]  # in each mode, in random order: 36 workers and 12 owners


@pytest.mark.parametrize("mode", NAMES)
def test_requests_do_not_notice_transitions(checkpoint: Path, members: list[Member], mode: str) -> None:
    """What is copied is what the operation's plan says, to the byte: nothing where memory is shared, of KV neither."""

    async def go() -> None:
        choose, fields = random.Random(f"transitions {mode}"), MODES[NAMES.index(mode)]
        async with under_load(members, checkpoint, rebalance_s=0.0, **fields) as load:
            controller, hands, size = load.deployment.controller, load.deployment.hands, 2
            seen, copied_kv = {replicated(load)}, 0
            for first in (*FIRST, *(0,) * TRANSITIONS):
                size = first or choose.choice([n for n in (1, 2, 3, 4) if n != size])
                await until(lambda: everyone_has_some(load))
                before, had, resumed = controller._state.serving, taken_in(hands), len(load.resumed)
                operation = await controller.scale(load.token, size)
                asked = controller._state.operations[-1]
                ended = await controller.operation(load.token, operation.id, LIMIT_S)
                assert (ended.state, ended.reason) == ("done", ""), ended
                copied_kv += sum(worker.kv_copied_bytes for worker in (await settled(load, size)).workers)
                await cleared(load)
                planned = preview(before.layout, asked.goal, asked.route)
                has = taken_in(hands)
                for pool in planned.pools:
                    if pool.pool in has:  # else its device has left
                        copied, loaded = np.subtract(has[pool.pool], had.get(pool.pool, (0, 0)))
                        assert (copied, loaded) == (pool.loaded_bytes, 0), pool
                assert not planned.moved_bytes or "memory_mode" in fields
                moved = load.resumed[resumed:]
                assert moved or size >= len(before.layout.devices) or "fleet" in fields  # a slow one may have none
                recomputed = [sequence for sequence in begun(moved) if sequence.cached < sequence.tokens - 1]
                assert "fleet" in fields or not recomputed, (recomputed, moved)  # small devices lack room
                seen.add(replicated(load))
            assert bool(copied_kv) == ("memory_mode" in fields)
            assert True in seen or "spare_slots" not in fields
            assert any(sequence.cached == sequence.tokens - 1 for sequence in load.resumed)

    asyncio.run(go())


@pytest.mark.parametrize("mode", ["replicas", "separate"])
def test_requests_do_not_notice_that_experts_move(checkpoint: Path, members: list[Member], mode: str) -> None:
    """Re-balanced again and again, since the first device's experts are always the busy ones by what was measured."""

    async def go() -> None:
        async with under_load(members, checkpoint, rebalance_s=0.0, **MODES[NAMES.index(mode)]) as load:
            controller = load.deployment.controller
            before = controller._state.serving
            assert before is not None
            for _ in range(3):
                busy_on_the_first(controller)
                operation = await controller.rebalance(load.token)
                ended = await controller.operation(load.token, operation.id, LIMIT_S)
                assert ended.state == "done", ended
                await settled(load, 2)
                await cleared(load)
            assert controller._state.serving.id > before.id + 1

    asyncio.run(go())


def replicated(load: Load) -> bool:
    """Whether an expert is on several devices: one that was busy in the file, or is by what was measured since."""
    record = load.deployment.controller._state.serving
    assert record is not None
    return any(len(replicas) > 1 for replicas_E in record.layout.placement.replicas_LE for replicas in replicas_E)


def strike(load: Load, kind: str, choose: random.Random) -> None:
    """Kill or stop a worker, an owner, or both, of one device; a newcomer where there is one."""
    hands, record = load.deployment.hands, load.deployment.controller._state.serving
    assert record is not None
    serving, pending = set(record.workers), load.deployment.controller._state.pending
    coming = set(pending.record.workers) - serving if pending is not None and kind == "newcomer" else set()
    name = choose.choice(sorted((coming or serving) & set(hands.workers)))
    victim = hands.workers[name]
    if kind in ("worker", "both", "newcomer"):
        victim.kill()
    if kind == "hang":
        os.kill(victim.process.pid, SIGSTOP)
    if kind == "owner hangs":
        hands.hung.add(hands.owners[choose.choice(sorted(hands.owners))])
    if kind in ("owner", "both"):
        pool = record.layout.device_pool(record.rank_of(name)) if kind == "both" else ""
        owners = [owner for owner in sorted(hands.owners) if not pool or owner.partition("/")[2] == pool]
        hands.owners.pop(choose.choice(owners))._owner.close()


@pytest.mark.parametrize("mode", NAMES)
def test_requests_do_not_notice_kills(checkpoint: Path, members: list[Member], mode: str) -> None:
    async def go() -> None:
        choose = random.Random(f"kills {mode}")
        async with under_load(members, checkpoint, **MODES[NAMES.index(mode)]) as load:
            controller, went_on = load.deployment.controller, list[bool]()
            for kind in choose.sample(STRIKES, len(STRIKES)):
                await settled(load, 2)
                await until(lambda: everyone_has_some(load))
                await asyncio.sleep(choose.uniform(0.0, 0.2))
                was, resumed = controller._state.serving.id, len(load.resumed)
                strike(load, kind, choose)
                await until(lambda was=was, k=kind: k == "owner" or controller._state.serving.id > was)
                if kind == "worker":
                    await settled(load, 2)
                    went_on += [s.cached == s.tokens - 1 for s in begun(load.resumed[resumed:])]
            await settled(load, 2)
            await cleared(load)
            assert sum(went_on) > 0.8 * len(went_on) > 4, load.resumed

    asyncio.run(go())


# What growing from 2 to 3 and shrinking from 3 to 2 are struck at, in turn; over gloo nothing has to be freed.
STEPS: tuple[type[Effect], ...] = (Fill, Prepare, Prepare, HandOver, Commit, Commit, ResizeKV, Free)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("worker", "gloo"),
        ("owner", "replicas"),
        ("both", "separate"),
        ("hang", "replicas"),
        ("owner hangs", "replicas"),
        ("worker", "mixed"),
        ("newcomer", "separate"),
    ],
)
def test_a_kill_at_every_step_of_a_transition(checkpoint: Path, members: list[Member], kind: str, mode: str) -> None:
    """Struck when an effect of each kind begins; the target is reached."""

    async def go() -> None:
        choose, patience = random.Random(7), {"hang_timeout_s": 2.0} if "hang" in kind else {}
        async with under_load(members, checkpoint, rebalance_s=0.0, **MODES[NAMES.index(mode)], **patience) as load:
            controller, size = load.deployment.controller, 2
            for effect in STEPS[: 6 if mode == "gloo" else 8]:
                size = 5 - size
                await settled(load, 5 - size)
                struck = strike_at(load, effect, lambda: strike(load, kind, choose))
                operation = await controller.scale(load.token, size)
                ended = await controller.operation(load.token, operation.id, LIMIT_S)
                assert ended.state == "done", ended
                assert struck(), f"{effect.__name__} was not seen while going to {size}"
                await settled(load, size)
                await cleared(load)

    asyncio.run(go())


@pytest.mark.parametrize("mode", ["replicas", "separate"])
def test_a_kill_at_any_moment_of_a_transition(
    checkpoint: Path, members: list[Member], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between the boundary and what the controller hears of it."""
    monkeypatch.setattr(attempts, "_SHORT_LIFE_S", 0.0)  # else it would be given up: so many die within a second

    async def go() -> None:
        choose = random.Random(f"moments {mode}")
        async with under_load(members, checkpoint, rebalance_s=0.0, **MODES[NAMES.index(mode)]) as load:
            controller, size = load.deployment.controller, 2
            for round_ in range(8):
                size = 5 - size
                await settled(load, 5 - size)
                operation = await controller.scale(load.token, size)
                await asyncio.sleep(choose.uniform(0.0, 0.15))
                strike(load, choose.choice(["worker", "worker", "newcomer", "both"]), choose)
                ended = await controller.operation(load.token, operation.id, LIMIT_S)
                assert ended.state == "done", (round_, ended)
                await settled(load, size)
                await cleared(load)

    asyncio.run(go())


@pytest.mark.parametrize("mode", ["replicas", "separate"])
def test_another_target_at_every_step_of_a_transition(checkpoint: Path, members: list[Member], mode: str) -> None:
    """Asked for as an effect of each kind begins: the first one gives way before its commit, and else is followed."""

    async def go() -> None:
        choose = random.Random(f"another {mode}")
        async with under_load(members, checkpoint, rebalance_s=0.0, **MODES[NAMES.index(mode)]) as load:
            controller, token, size = load.deployment.controller, load.token, 2
            deeds = controller._deeds
            assert deeds is not None
            for effect in STEPS:
                first, other = 5 - size, choose.choice([1, 4])
                asked: list[tuple[int, OperationStatus]] = []
                committed: set[int] = set()

                async def ask(other: int = other, asked: list[tuple[int, OperationStatus]] = asked) -> None:
                    pending = controller._state.pending
                    coming = controller._state.serving if pending is None else pending.record
                    assert coming is not None
                    asked.append((coming.id, await controller.scale(token, other)))

                with watched(deeds, committed):
                    struck = strike_at(load, effect, ask)
                    operation = await controller.scale(token, first)
                    ended = await controller.operation(token, operation.id, LIMIT_S)
                    assert struck(), f"{effect.__name__} was not seen while going to {first}"
                    assert ended.state in ("done", "superseded"), ended
                    ((generation, following),) = asked
                    following = await controller.operation(token, following.id, LIMIT_S)
                    assert (following.state, following.reason) == ("done", ""), following
                    await settled(load, other)
                if effect in (Fill, Prepare):
                    assert ended.state == "superseded"
                    assert generation not in committed
                elif effect is not ResizeKV:  # before or after it
                    assert generation in committed
                await cleared(load)
                operation = await controller.scale(token, size := first)
                assert (await controller.operation(token, operation.id, LIMIT_S)).state == "done"
                await settled(load, first)
                await cleared(load)

    asyncio.run(go())


@contextmanager
def watched(deeds: Deeds, committed: set[int]) -> Iterator[None]:
    """Note generations that somebody is told to switch to."""
    real = deeds.do

    def do(effect: Effect) -> Awaitable[None]:
        if isinstance(effect, Commit):
            committed.add(effect.generation)
        return real(effect)

    deeds.do = do  # type: ignore[method-assign]
    try:
        yield
    finally:
        deeds.do = real  # type: ignore[method-assign]


@pytest.mark.parametrize("mode", ["replicas", "separate"])
def test_cancel_leaves_no_trace_before_the_commit_and_is_refused_from_then_on(
    checkpoint: Path, members: list[Member], mode: str
) -> None:
    async def go() -> None:
        async with under_load(members, checkpoint, rebalance_s=0.0, **MODES[NAMES.index(mode)]) as load:
            controller, token = load.deployment.controller, load.token

            async def canceled() -> OperationStatus:
                return await controller.cancel(token, controller._state.operations[-1].id)

            for size, other, effect in ((2, 4, Fill), (2, 4, Prepare), (3, 1, Prepare), (3, 1, Commit)):
                await controller.operation(token, (await controller.scale(token, size)).id, LIMIT_S)
                await settled(load, size)
                await cleared(load)
                was = controller._state.serving
                asked: list[asyncio.Task[OperationStatus]] = []
                struck = strike_at(load, effect, lambda asked=asked: asked.append(asyncio.create_task(canceled())))
                operation = await controller.scale(token, other)
                ended = await controller.operation(token, operation.id, LIMIT_S)
                assert struck(), effect
                if effect is Commit:
                    with pytest.raises(OperatorError, match="is being committed"):
                        await asked[0]
                    assert ended.state == "done"
                else:
                    assert (await asked[0]).state == ended.state == "canceled"
                await settled(load, other if effect is Commit else size)
                assert effect is Commit or controller._state.serving == was
                await cleared(load)

    asyncio.run(go())


@pytest.mark.parametrize("fields", [MODES[0], MODES[2]], ids=str)
def test_a_leaver_that_dies_before_its_hand_over_leaves_its_kv(
    checkpoint: Path, members: list[Member], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_deeds, "AT_SWITCH_BLOCKS", -1)  # as if its sequences were too many to go on at the switch

    async def go() -> None:
        async with under_load(members, checkpoint, **{**fields, "workers": 3}) as load:
            controller, hands = load.deployment.controller, load.deployment.hands

            def kill_the_leaver() -> None:
                (leaver,) = [m.name for m in controller._cluster.workers.values() if m.report.retired]
                hands.workers[leaver].kill()

            await settled(load, 3)
            struck = strike_at(load, HandOver, kill_the_leaver)
            operation = await controller.scale(load.token, 2)
            ended = await controller.operation(load.token, operation.id, LIMIT_S)
            assert ended.state == "done", ended
            assert struck()
            await until(lambda: load.resumed)
            await cleared(load)
        for sequence in load.resumed:
            assert sequence.cached == sequence.tokens - 1, sequence  # the last one says what comes next

    asyncio.run(go())
