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

import numpy as np
import pytest
from concertina.orchestrator import kv_deeds
from concertina.orchestrator.config import EngineOptions
from concertina.orchestrator.controller import Controller
from concertina.orchestrator.core.facts import Commit, Effect, Fill, Free, HandOver, Prepare, ResizeKV
from concertina.orchestrator.ingress.members import Member as IngressMember
from concertina.orchestrator.ingress.members import connect_worker
from concertina.orchestrator.ingress.router import Router
from concertina.orchestrator.preview import preview
from concertina.orchestrator.status import DeploymentStatus
from concertina.planners.cluster import Device
from concertina.workers.generation import LEDGER_KEY
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


@pytest.fixture(scope="module")
def crew() -> Iterator[list[Member]]:
    """Processes that are alive, as far as tests have left them: starting six takes longer than most of the tests."""
    Member.all.clear()  # other modules' have ended
    yield Member.all
    for member in Member.all:
        member.end()
    Member.all.clear()


@pytest.fixture
def members(crew: list[Member]) -> list[Member]:
    for member in [member for member in crew if not member.runs]:
        member.end()
        crew.remove(member)
    for _ in range(6 - len(crew)):
        Member()
    return list(crew)


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
            assert all(len(set(tokens)) > TOKENS / 4 for tokens in load.reference.values()), "what is lost must show"
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
            whole = record is not None and {pool.name for pool in status.pools} >= set(record.layout.pools)
            if (
                whole
                and status.phase == "serving"
                and states == ["serving"] * workers
                and not controller._under_way.tasks
            ):
                break
            await asyncio.sleep(0.05)
    return status


async def cleared(load: Load) -> None:
    """Return once the pools hold what the layout that serves asks for, page for page, and nothing else.

    What a kill left behind goes in a later turn.
    """
    record = load.deployment.controller._state.serving
    assert record is not None
    wanted = {p: {r.key: r.pages for r in requests} for p, requests in record.layout.extents(record.id).items()}
    try:
        await until(lambda: held(load.deployment.hands) == wanted)
    except TimeoutError:
        assert held(load.deployment.hands) == wanted


def held(hands: ProcessHands) -> dict[str, dict[str, int]]:
    """Pages by pool and extent, unfinished ones too, but for books; a pool that waits for a device has no others."""
    pools = {}
    for name, owner in hands.owners.items():
        extents = [e for e in owner._owner.extents() if e.purpose != "table" and e.key != LEDGER_KEY]
        pages = {extent.key: len(extent.pages) for extent in extents}
        if pages:
            pools[name.partition("/")[2]] = pages
    return pools


def taken_in(hands: ProcessHands) -> dict[str, tuple[int, int]]:
    """Bytes by pool: copied from peers, loaded from the checkpoint."""
    reports = {name.partition("/")[2]: owner.report() for name, owner in hands.owners.items()}
    return {pool: (report.copied_bytes, report.loaded_bytes) for pool, report in reports.items()}


FAST, SLOW = Device("fast", "fast", 3 << 20, 4e10, 2e10), Device("slow", "slow", 2 << 20, 1e10, 1e10)
MIXED = tuple(replace(kind, name=f"cpu-{i}") for i, kind in enumerate((FAST, SLOW, FAST, SLOW)))
MODES = [
    {"spare_slots": 2},
    {"exchange": "gloo"},
    {"memory_mode": "separate"},
    {"memory_mode": "separate", "fleet": MIXED, "reserve_memory": True},
]
NAMES = ["replicas", "gloo", "separate", "mixed"]  # memory and exchange are shared unless it says otherwise
FIRST = (4, 1, 4)  # sizes, and then
TRANSITIONS = 8  # random ones in each mode: 32 in all, and 12 given ones
STRIKES = ["worker"] * 6 + ["both"] * 2 + ["hang", "owner"]  # in each mode, in random order: 36 workers and 12 owners


@pytest.mark.parametrize("mode", NAMES)
def test_requests_do_not_notice_transitions(checkpoint: Path, members: list[Member], mode: str) -> None:
    """What is copied is what the dry run says, to the byte: nothing where memory is shared."""

    async def go() -> None:
        choose, fields = random.Random(f"transitions {mode}"), MODES[NAMES.index(mode)]
        async with under_load(members, checkpoint, rebalance_s=0.0, **fields) as load:
            controller, hands, size = load.deployment.controller, load.deployment.hands, 2
            seen = {replicated(load)}
            for first in (*FIRST, *(0,) * TRANSITIONS):
                size = first or choose.choice([n for n in (1, 2, 3, 4) if n != size])
                before, had = controller._state.serving, taken_in(hands)
                operation = await controller.scale(load.token, size)
                asked = controller._state.operations[-1]
                ended = await controller.operation(load.token, operation.id, LIMIT_S)
                assert (ended.state, ended.reason) == ("done", ""), ended
                await settled(load, size)
                await cleared(load)
                planned = preview(before.layout, asked.goal, asked.route)
                has = taken_in(hands)
                for pool in planned.pools:
                    if pool.pool in has:  # else its device has left
                        copied, loaded = np.subtract(has[pool.pool], had.get(pool.pool, (0, 0)))
                        assert (copied, loaded) == (pool.loaded_bytes, 0), pool
                assert not planned.moved_bytes or "memory_mode" in fields
                seen.add(replicated(load))
            assert True in seen or "spare_slots" not in fields
            went_on = [sequence.cached == sequence.tokens - 1 for sequence in load.resumed]
            assert sum(went_on) > (0 if "fleet" in fields else len(went_on) / 2), load.resumed  # small ones lack room

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


def busy_on_the_first(controller: Controller) -> None:
    """As if what was measured had asked for experts of the first device twenty times as often as for others."""
    record, balancer = controller._state.serving, controller._balancer
    assert record is not None
    assert balancer is not None
    pairs_LE = np.full_like(balancer.window.pairs_LE, 1e6)
    for layer, expert in record.layout.experts_of(0):
        pairs_LE[layer, expert] *= 20
    balancer.window = replace(balancer.window, pairs_LE=pairs_LE, steps=1e4)


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
            controller = load.deployment.controller
            for kind in choose.sample(STRIKES, len(STRIKES)):
                await settled(load, 2)
                await asyncio.sleep(choose.uniform(0.0, 0.2))
                was = controller._state.serving.id
                strike(load, kind, choose)
                await until(lambda was=was, k=kind: k == "owner" or controller._state.serving.id > was)
            await settled(load, 2)
            await cleared(load)
            assert any(sequence.cached == sequence.tokens - 1 for sequence in load.resumed), load.resumed

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
        async with under_load(members, checkpoint, **MODES[NAMES.index(mode)], **patience) as load:
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


def strike_at(load: Load, kind: type[Effect], strike: Callable[[], None]) -> Callable[[], bool]:
    """Strike once when the next effect of this kind begins; returns what takes the trap away, and says if it struck."""
    deeds = load.deployment.controller._deeds
    assert deeds is not None
    real, armed = deeds.do, [True]

    def do(effect: Effect) -> Awaitable[None]:
        if armed and isinstance(effect, kind):
            armed.clear()
            strike()
        return real(effect)

    def taken_away() -> bool:
        deeds.do = real  # type: ignore[method-assign]
        return not armed

    deeds.do = do  # type: ignore[method-assign]
    return taken_away
