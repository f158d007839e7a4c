"""A deployment of real worker processes and a real controller under streams that never stop, without Ray.

Every stream is greedy in float32; its tokens must be those of a run in which nothing happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from concertina.orchestrator.config import EngineOptions
from concertina.orchestrator.controller import Controller
from concertina.orchestrator.core.facts import Effect
from concertina.orchestrator.ingress.members import Member as IngressMember
from concertina.orchestrator.ingress.members import connect_worker
from concertina.orchestrator.ingress.router import Router
from concertina.orchestrator.status import DeploymentStatus
from concertina.planners.cluster import Device
from concertina.workers.generation import LEDGER_KEY
from concertina.workers.protocol import EngineRequest, SamplingParams

from .crew import Deployment, Member, ProcessHands, deployed
from .streams import Noting, Resumed

PROMPTS = [tuple((7 * k + i) % 250 for i in range(20 + 9 * k)) for k in range(6)]
TOKENS = 48
LIMIT_S = 100.0
LOADS = "loads.json"


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
            listed = await self.deployment.controller.members(seen, 1.0)  # that one may have died
            seen = listed.version
            known = [
                IngressMember(a.worker, a.host, a.port, self.token, a.speed, a.draining, a.device)
                for a in listed.workers
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


def everyone_has_some(load: Load) -> bool:
    """Whether all workers have sequences, but for slow ones, which seldom get any."""
    return all(lane.sequences or lane.member.speed < 1 for lane in load.router._lanes.all)


def begun(resumed: Sequence[Resumed]) -> list[Resumed]:
    """Those that had tokens when they went on."""
    return [sequence for sequence in resumed if sequence.tokens not in map(len, PROMPTS)]


FAST, SLOW = Device("fast", "fast", 3 << 20, 4e10, 2e10), Device("slow", "slow", 2 << 20, 1e10, 1e10)
MIXED = tuple(replace(kind, name=f"cpu-{i}") for i, kind in enumerate((FAST, SLOW, FAST, SLOW)))
MODES = [
    {"spare_slots": 2},
    {"exchange": "gloo"},
    {"memory_mode": "separate"},
    {"memory_mode": "separate", "fleet": MIXED, "reserve_memory": True},
]
NAMES = ["replicas", "gloo", "separate", "mixed"]  # memory and exchange are shared unless it says otherwise


def busy_on_the_first(controller: Controller) -> None:
    """As if what was measured had asked for experts of the first device twenty times as often as for others."""
    record, balancer = controller._state.serving, controller._balancer
    assert record is not None
    assert balancer is not None
    pairs_LE = np.full_like(balancer.window.pairs_LE, 1e6)
    for layer, expert in record.layout.experts_of(0):
        pairs_LE[layer, expert] *= 20
    balancer.window = replace(balancer.window, pairs_LE=pairs_LE, steps=1e4)


def strike_at(load: Load, kind: type[Effect], strike: Callable[[], Awaitable[None] | None]) -> Callable[[], bool]:
    """Strike once when the next effect of this kind begins; returns what takes the trap away, and says if it struck.

    The effect waits for what ``strike`` returns, if that can be waited for.
    """
    deeds = load.deployment.controller._deeds
    assert deeds is not None
    real, armed = deeds.do, [True]

    def do(effect: Effect) -> Awaitable[None]:
        if not (armed and isinstance(effect, kind)):
            return real(effect)
        armed.clear()
        struck = strike()
        return real(effect) if struck is None else after(struck, effect)

    async def after(struck: Awaitable[None], effect: Effect) -> None:
        await struck
        await real(effect)

    def taken_away() -> bool:
        deeds.do = real  # type: ignore[method-assign]
        return not armed

    deeds.do = do  # type: ignore[method-assign]
    return taken_away
