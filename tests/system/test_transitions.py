"""Real workers in processes of their own, a real controller and router: random transitions and kills under load (S3).

Every stream is greedy in float32; its tokens must be those of a run in which nothing happened.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import SIGSTOP
from typing import Any

import pytest
from concertina.orchestrator.config import EngineOptions
from concertina.orchestrator.core.facts import Commit, Effect, Fill, Free, HandOver, Prepare, ResizeKV
from concertina.orchestrator.ingress.members import Member as IngressMember
from concertina.orchestrator.ingress.members import connect_worker
from concertina.orchestrator.ingress.router import Router
from concertina.orchestrator.status import DeploymentStatus
from concertina.planners.cluster import Device
from concertina.workers.protocol import EngineRequest, SamplingParams

from ..checkpoints import make_checkpoint
from .crew import Deployment, Member, ProcessHands, deployed
from .streams import Noting, Resumed

pytestmark = pytest.mark.ray  # several processes
PROMPTS = [tuple((7 * k + i) % 250 for i in range(20 + 9 * k)) for k in range(6)]
TOKENS = 48
LIMIT_S = 100.0
LOADS = "loads.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With loads beside it in which a layer's first expert gets half of the tokens."""
    path = make_checkpoint("olmoe", tmp_path_factory.mktemp("model"))
    config = json.loads((path / "config.json").read_text())
    experts = config["num_experts"]
    counts = [[experts - 1, *([1] * (experts - 1))]] * config["num_hidden_layers"]
    (path / LOADS).write_text(json.dumps({"tokens_per_step": 64, "counts_LE": counts}))
    return path


@pytest.fixture
def members() -> Iterator[list[Member]]:
    crew = [Member() for _ in range(6)]
    yield crew
    for member in Member.all:
        member.end()
    Member.all.clear()


@dataclass
class Load:
    """Streams that never stop: each prompt again and again through a router, as the ingress does it."""

    deployment: Deployment
    token: str
    router: Router = field(init=False)
    resumed: list[Resumed] = field(default_factory=list)
    reference: dict[int, list[int]] = field(default_factory=dict)
    finished: int = 0
    streaming: bool = True

    def __post_init__(self) -> None:
        self.router = Router(self.connect)

    async def connect(self, member: IngressMember) -> Noting:
        return Noting(await connect_worker(member), member.device, self.resumed.append)

    async def follow(self) -> None:
        seen = -1
        while True:
            listed = await self.deployment.controller.members(seen)
            seen = listed.version
            known = [
                IngressMember(a.worker, a.host, a.port, self.token, 1.0, a.draining, a.device) for a in listed.workers
            ]
            self.router.update(known, listed.awaited, listed.heirs)

    async def answer(self, k: int) -> list[int]:
        request = EngineRequest(f"r{k}", PROMPTS[k], SamplingParams(TOKENS, temperature=0.0, ignore_eos=True))
        tokens: list[int] = []
        async for output in self.router.stream(request):
            tokens += output.token_ids
        return tokens

    async def client(self, k: int) -> None:
        while self.streaming:
            assert await self.answer(k) == self.reference[k], f"prompt {k}"
            self.finished += 1


@asynccontextmanager
async def under_load(members: list[Member], checkpoint: Path, **fields: Any) -> AsyncIterator[Load]:
    engine = EngineOptions(max_model_len=256, threads=1)
    if fields.get("spare_slots"):
        fields = {**fields, "loads_file": str(checkpoint / LOADS)}
    options = {"engine": engine, "workers": 2, "standbys": 1, "exchange_timeout_s": 10.0, "hang_timeout_s": 4.0}
    async with deployed(members, checkpoint, **{**options, **fields}) as deployment:
        load = Load(deployment, deployment.controller._config.token)
        following = asyncio.create_task(load.follow())
        try:
            load.reference = {k: await load.answer(k) for k in range(len(PROMPTS))}
            clients = [asyncio.create_task(load.client(k)) for k in range(len(PROMPTS))]
            yield load
            await until(lambda: load.finished > 2 * len(PROMPTS), clients)
            load.streaming = False
            await asyncio.wait_for(asyncio.gather(*clients), LIMIT_S)
        finally:
            following.cancel()
            await load.router.close()


async def until(holds: Callable[[], Any], clients: list[asyncio.Task[None]] | None = None) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            for client in clients or []:
                if client.done():
                    client.result()
            await asyncio.sleep(0.02)


async def settled(load: Load, workers: int) -> DeploymentStatus:
    """The deployment once one generation serves on so many workers, and nothing is left over."""
    controller = load.deployment.controller
    async with asyncio.timeout(LIMIT_S):
        while True:
            controller.check()
            status = await controller.status()
            states = [w.state for w in status.workers]
            record = controller._state.serving
            whole = record is not None and {pool.name for pool in status.pools} >= set(record.layout.pools())
            if (
                whole
                and status.phase == "serving"
                and states == ["serving"] * workers
                and not controller._under_way.tasks
            ):
                break
            await asyncio.sleep(0.05)
    for pool in status.pools:
        assert sum(pool.by_purpose.values()) == pool.pages
    return status


def kv_extents(hands: ProcessHands) -> set[str]:
    return {key for owner in hands.owners.values() for key in owner.report().pages if key.startswith("kv/")}


async def cleared(load: Load, workers: int) -> None:
    """Return once no KV is left but that of the devices that serve: what a kill left behind goes in a later turn."""
    expected = {f"kv/cpu-{i}" for i in range(workers)}
    await until(lambda: kv_extents(load.deployment.hands) == expected)


FAST, SLOW = Device("fast", "fast", 3 << 20, 4e10, 2e10), Device("slow", "slow", 2 << 20, 1e10, 1e10)
MIXED = tuple(replace(kind, name=f"cpu-{i}") for i, kind in enumerate((FAST, SLOW, FAST, SLOW)))
MODES = [
    {"spare_slots": 2},
    {"exchange": "gloo"},
    {"memory_mode": "separate"},
    {"memory_mode": "separate", "fleet": MIXED, "reserve_memory": True},
]
NAMES = ["replicas", "gloo", "separate", "mixed"]  # memory and exchange are shared unless it says otherwise
TRANSITIONS = 8  # of each mode, and as many kills: more than 30 of both in all


@pytest.mark.parametrize("fields", MODES, ids=NAMES)
def test_requests_do_not_notice_transitions(checkpoint: Path, members: list[Member], fields: dict[str, Any]) -> None:
    async def go() -> None:
        choose = random.Random(3)
        async with under_load(members, checkpoint, **fields) as load:
            controller, size, seen = load.deployment.controller, 2, {replicated(load)}
            for _ in range(TRANSITIONS + 1):
                size = choose.choice([n for n in (1, 2, 3, 4) if n != size])
                operation = await controller.scale(load.token, size)
                ended = await controller.operation(load.token, operation.id, LIMIT_S)
                assert (ended.state, ended.reason) == ("done", ""), ended
                await settled(load, size)
                await cleared(load, size)
                seen.add(replicated(load))
            assert True in seen or "spare_slots" not in fields

    asyncio.run(go())


def replicated(load: Load) -> bool:
    """Whether an expert is on several devices: one that was busy in the file, or is by what was measured since."""
    record = load.deployment.controller._state.serving
    assert record is not None
    return any(len(replicas) > 1 for replicas_E in record.layout.placement.replicas_LE for replicas in replicas_E)


def strike(load: Load, kind: str, choose: random.Random) -> None:
    """Kill or stop a worker, an owner, or both."""
    hands, record = load.deployment.hands, load.deployment.controller._state.serving
    assert record is not None
    victim = hands.workers[choose.choice(sorted(set(record.workers) & set(hands.workers)))]
    if kind in ("worker", "both"):
        victim.kill()
    if kind == "hang":
        os.kill(victim.process.pid, SIGSTOP)
    if kind == "owner hangs":
        hands.hung.add(hands.owners[choose.choice(sorted(hands.owners))])
    if kind in ("owner", "both"):
        hands.owners.pop(choose.choice(sorted(hands.owners)))._owner.close()


@pytest.mark.parametrize("fields", MODES, ids=NAMES)
def test_requests_do_not_notice_kills(checkpoint: Path, members: list[Member], fields: dict[str, Any]) -> None:
    async def go() -> None:
        choose = random.Random(5)
        async with under_load(members, checkpoint, **fields) as load:
            controller = load.deployment.controller
            for _ in range(TRANSITIONS + 1):
                await settled(load, 2)
                kind, was = choose.choice(["worker", "worker", "owner", "both", "hang"]), controller._state.serving.id
                strike(load, kind, choose)
                await until(lambda was=was, k=kind: k == "owner" or controller._state.serving.id > was)
            await settled(load, 2)

    asyncio.run(go())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("worker", MODES[1]),
        ("owner", MODES[0]),
        ("both", MODES[2]),
        ("hang", MODES[0]),
        ("owner hangs", MODES[0]),
        ("worker", MODES[3]),
    ],
    ids=["worker-gloo", "owner-replicas", "both-separate", "hang-replicas", "owner hangs-replicas", "worker-mixed"],
)
def test_a_kill_at_every_step_of_a_transition(
    checkpoint: Path, members: list[Member], kind: str, fields: dict[str, Any]
) -> None:
    """Growing and shrinking between 2 and 3, struck when an effect of each kind begins; the target is reached."""

    async def go() -> None:
        choose = random.Random(7)
        async with under_load(members, checkpoint, **fields) as load:
            controller, size = load.deployment.controller, 2
            for effect in (ResizeKV, Fill, Prepare, Commit, HandOver, Free):
                size = 5 - size
                await settled(load, 5 - size)
                struck = strike_at(load, effect, lambda: strike(load, kind, choose))
                operation = await controller.scale(load.token, size)
                ended = await controller.operation(load.token, operation.id, LIMIT_S)
                if ended.state == "failed":
                    ended = await controller.operation(
                        load.token, (await controller.scale(load.token, size)).id, LIMIT_S
                    )
                assert ended.state == "done", ended
                struck()
                await settled(load, size)
                await cleared(load, size)

    asyncio.run(go())


@pytest.mark.parametrize("fields", [MODES[0], MODES[2]], ids=str)
def test_a_leaver_that_dies_before_its_hand_over_leaves_its_kv(
    checkpoint: Path, members: list[Member], fields: dict[str, Any]
) -> None:
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
            struck()
            await until(lambda: load.resumed)
            for sequence in load.resumed:
                assert sequence.cached == sequence.tokens - 1, sequence  # the last one says what comes next
            await cleared(load, 2)

    asyncio.run(go())


def strike_at(load: Load, kind: type[Effect], strike: Callable[[], None]) -> Callable[[], None]:
    """Strike once when the next effect of this kind begins; returns what takes the trap away."""
    deeds = load.deployment.controller._deeds
    assert deeds is not None
    real, armed = deeds.do, [True]

    def do(effect: Effect) -> Awaitable[None]:
        if armed and isinstance(effect, kind):
            armed.clear()
            strike()
        return real(effect)

    deeds.do = do  # type: ignore[method-assign]
    return lambda: setattr(deeds, "do", real)
