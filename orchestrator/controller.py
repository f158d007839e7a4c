"""The controller's shell: looks at the cluster, asks the core what to do, and does it. Knows no Ray.

One loop: snapshot, `core.step.step`, start the effects it asks for. An effect that ends wakes the loop; so does a tick,
because a wake-up may be lost and a worker may die silently.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from ..errors import ConcertinaError, InternalError
from ..workers.engine.scheduler import SchedulerConfig
from ..workers.generation import Assignment, ExchangeSpec, Generation, PoolExtents
from ..workers.model_files import ModelFiles
from ..workers.owner import OwnerConfig
from ..workers.pages.holds import PagesHeld
from ..workers.roles import WorkerConfig, WorkerReport
from .balancer import Balancer
from .config import DeploymentConfig
from .core.facts import (
    Commit,
    Effect,
    Fill,
    Free,
    OpenStore,
    PoolFact,
    Prepare,
    Snapshot,
    StartOwner,
    StartWorker,
    StopWorker,
    WorkerFact,
)
from .core.layout import node_pool
from .core.state import Record, State
from .core.step import step
from .hands import Hands, NodeInfo, OwnerHandle, WorkerHandle
from .placing import Site
from .planfiles import model_spec
from .planning import MAILBOX_BYTES, max_model_len, plan_layout
from .report import worker_statuses
from .status import DeploymentStatus, PoolStatus, Progress, WorkerAddress

_log = logging.getLogger(__name__)
_TICK_S = 1.0
_WEIGHTS = ("experts", "trunk")


@dataclass(frozen=True, slots=True)
class _Pool:
    """A memory owner of ours, and the extents it had when it was last asked."""

    node: str
    config: OwnerConfig
    handle: OwnerHandle
    address: str
    pages: Mapping[str, tuple[int, ...]]


@dataclass(slots=True)
class _Worker:
    """A worker of ours, what it last said, and where it takes requests."""

    node: str
    handle: WorkerHandle
    report: WorkerReport
    address: tuple[str, int] | None = None

    def fact(self) -> WorkerFact:
        return WorkerFact(self.node, self.report.prepared, self.report.serving, self.report.failed)


class Controller:
    """One deployment, from its configuration to a serving generation.

    Parameters
    ----------
    config : DeploymentConfig
    hands : Hands
        What starts processes and tells the time.
    """

    def __init__(self, config: DeploymentConfig, hands: Hands) -> None:
        self._config = config
        self._hands = hands
        self._begin_s = hands.now_s()
        self._state = State()
        self._reason = "reading the checkpoint"
        self._model: ModelFiles | None = None
        self._nodes: dict[str, NodeInfo] = {}
        self._pools: dict[str, _Pool] = {}
        self._workers: dict[str, _Worker] = {}
        self._store: tuple[str, int] | None = None
        self._busy: dict[Effect, asyncio.Task[None]] = {}
        self._errors: dict[Effect, str] = {}
        self._fill_bytes: dict[str, int] = {}
        self._balancer: Balancer | None = None
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bring the first generation up; returns when it serves.

        Raises
        ------
        OperatorError
            The checkpoint, placement, memory or cluster does not allow it; nothing is served then.
        InternalError
            A process that was started has died.
        """
        self._model = ModelFiles.open(self._config.checkpoint, self._config.dtype)
        self._nodes = {node.id: node for node in await self._hands.nodes()}
        layout = plan_layout(self._config, self._model, list(self._nodes.values()), self._hands.now_s)
        site = Site(layout.seats, model_spec(self._model.config), self._config.spare_slots)
        self._balancer = Balancer(site, self._config.rebalance_s, self._config.loads_file, self._hands.now_s)
        self._state = replace(self._state, target=layout)
        self._loop = asyncio.create_task(self._run())
        async with self._changed:
            await self._changed.wait_for(lambda: self._state.failure or self._state.serving is not None)
        self.check()

    def check(self) -> None:
        """Raise `InternalError` if the deployment has failed."""
        if self._state.failure:
            raise InternalError(self._state.failure)

    async def progress(self) -> Progress:
        """How far starting up is."""
        loaded = sum(await asyncio.gather(*(pool.handle.loaded_bytes() for pool in self._pools.values())))
        return Progress(self._reason, loaded, sum(self._fill_bytes.values()))

    async def stop(self) -> None:
        """End the loop and all workers; owners end with their processes."""
        if self._loop is not None:
            self._loop.cancel()
        for task in self._busy.values():
            task.cancel()
        await asyncio.gather(*(w.handle.stop() for w in self._workers.values()), return_exceptions=True)

    def members(self) -> list[WorkerAddress]:
        """Workers that serve now, for whoever sends them requests."""
        record = self._state.serving
        if record is None or self._state.failure:
            return []
        known = ((w, self._workers[w].address) for w in record.workers)
        return [WorkerAddress(w, *where) for w, where in known if where is not None]

    async def status(self) -> DeploymentStatus:
        """One picture of everything."""
        record, config, model = self._state.serving, self._config, self._model
        pools = await asyncio.gather(*(self._pool_status(name) for name in sorted(self._pools)))
        workers = worker_statuses(record, [self._workers[w].report for w in record.workers]) if record else ()
        return DeploymentStatus(
            name=config.name,
            model=config.endpoint.model_name or os.path.basename(config.checkpoint),
            endpoint=f"http://{config.endpoint.host}:{config.endpoint.port}",
            generation=record.id if record else 0,
            phase="failed" if self._state.failure else "serving" if record else "starting",
            exchange=record.layout.exchange if record else "",
            dtype=model.dtype if model else config.dtype,
            layers=len(model.config.moe_layers) if model else 0,
            experts=model.config.experts if model else 0,
            uptime_s=self._hands.now_s() - self._begin_s,
            workers=workers,
            pools=tuple(pools),
            detail=self._state.failure,
        )

    async def _run(self) -> None:
        try:
            while True:
                await self._turn()
        except Exception as e:  # noqa: BLE001 - whatever ends the loop must end the deployment: nobody acts any more
            _log.exception("the controller's loop failed")
            self._state = replace(self._state, failure=f"the controller's loop failed: {_told(e)}")
            await self._tell()

    async def _turn(self) -> None:
        self._wake.clear()
        snapshot = await self._look()
        await self._balance()
        decision = step(self._state, snapshot)
        self._errors.clear()
        self._state = decision.state
        if decision.reason != self._reason:
            _log.info("%s", decision.reason)
        self._reason = decision.reason
        for effect in decision.effects:
            self._busy[effect] = asyncio.create_task(self._do(effect))
        await self._tell()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), _TICK_S)

    async def _tell(self) -> None:
        """Wake who waits for the state to change."""
        async with self._changed:
            self._changed.notify_all()

    async def _balance(self) -> None:
        """Let experts move where the measured loads ask for it, one generation at a time."""
        state = self._state
        if self._balancer is None or state.serving is None or state.pending is not None or state.failure:
            return
        self._balancer.observe({name: worker.report for name, worker in self._workers.items()})
        if not self._balancer.due:
            return
        try:
            better = await asyncio.to_thread(self._balancer.plan, state.serving.layout)
        except Exception:  # noqa: BLE001 - experts that stay where they are serve; ending that would be worse
            _log.exception("planning failed; experts stay where they are")
            return
        if better is not None:
            self._state = replace(self._state, target=better)

    async def _look(self) -> Snapshot:
        """Ask every worker; owners' extents are known from their last change."""
        names = list(self._workers)
        await asyncio.gather(*(self._report(name) for name in names))
        return Snapshot(
            nodes=frozenset(self._nodes),
            pools={name: PoolFact(p.node, p.address, p.pages) for name, p in self._pools.items()},
            workers={name: w.fact() for name, w in self._workers.items()},
            store=self._store,
            busy=frozenset(self._busy),
            errors=dict(self._errors),
        )

    async def _report(self, name: str) -> None:
        worker = self._workers[name]
        try:
            worker.report = await worker.handle.report()
            if worker.report.serving and worker.address is None:
                worker.address = await worker.handle.address()
        except InternalError as e:
            worker.report = replace(worker.report, failed=str(e).removeprefix(f"{name}: "))

    async def _do(self, effect: Effect) -> None:
        try:
            await self._doer(effect)
        except Exception as e:  # noqa: BLE001 - one that is not noted would be asked for again, for ever
            _log.error("%s: %s", effect, e, exc_info=not isinstance(e, ConcertinaError))
            self._errors[effect] = _told(e)
        finally:
            del self._busy[effect]
            self._wake.set()

    def _doer(self, effect: Effect) -> Awaitable[None]:
        match effect:
            case StartOwner():
                return self._start_owner(effect)
            case StartWorker():
                return self._start_worker(effect)
            case Fill():
                return self._fill(effect)
            case OpenStore():
                return self._open_store()
            case Prepare():
                return self._prepare(effect)
            case Commit():
                return self._commit(effect)
            case StopWorker():
                return self._stop_worker(effect)
            case Free():
                return self._free(effect)

    async def _start_owner(self, effect: StartOwner) -> None:
        record = self._record()
        name = f"{self._config.name}/{effect.pool}"
        config = OwnerConfig(name, effect.pages, record.layout.memory.page_bytes, self._config.token)
        handle = await self._hands.start_owner(effect.node, config)
        pool = _Pool(effect.node, config, handle, await handle.address(), await handle.pages())
        self._pools[effect.pool] = pool

    async def _start_worker(self, effect: StartWorker) -> None:
        assert self._model is not None
        node, engine, here = self._nodes[effect.node], self._config.engine, self._record().layout
        beside = sum(seat.node == effect.node for seat in here.seats)
        scheduler = SchedulerConfig(
            max_model_len=max_model_len(self._config, self._model),
            max_batched_tokens=engine.max_batched_tokens,
            max_running=engine.max_running,
            max_waiting=engine.max_waiting,
            chunked_prefill=engine.chunked_prefill,
        )
        config = WorkerConfig(
            name=effect.worker,
            host=node.host,
            token=self._config.token,
            threads=engine.threads or max(1, node.cpus // beside),
            scheduler=scheduler,
            prefix_caching=engine.prefix_caching,
        )
        handle = await self._hands.start_worker(effect.node, config)
        self._workers[effect.worker] = _Worker(effect.node, handle, await handle.report())

    async def _fill(self, effect: Fill) -> None:
        assert self._model is not None
        pool = self._pools[effect.pool]
        keys = [r.key for r in effect.requests if r.purpose in _WEIGHTS and r.key not in pool.pages]
        pieces = list(self._model.pieces(keys))
        self._fill_bytes[effect.pool] = self._fill_bytes.get(effect.pool, 0) + sum(p.source.nbytes for p in pieces)
        await pool.handle.fill(effect.requests, pieces)
        self._pools[effect.pool] = replace(pool, pages=await pool.handle.pages())

    async def _open_store(self) -> None:
        self._store = await self._hands.open_store()

    async def _prepare(self, effect: Prepare) -> None:
        record = self._record()
        worker = self._workers[effect.worker]
        await worker.handle.prepare(self._assignment(record, record.rank_of(effect.worker)))

    async def _commit(self, effect: Commit) -> None:
        await self._workers[effect.worker].handle.commit(effect.generation)

    async def _stop_worker(self, effect: StopWorker) -> None:
        await self._workers.pop(effect.worker).handle.stop()

    async def _free(self, effect: Free) -> None:
        pool = self._pools[effect.pool]
        try:
            await pool.handle.free(effect.keys)
        except PagesHeld as e:
            _log.info("%s; trying again", e)
            return
        self._pools[effect.pool] = replace(pool, pages=await pool.handle.pages())

    def _record(self) -> Record:
        """The generation that effects are for."""
        pending = self._state.pending
        assert pending is not None
        return pending.record

    def _assignment(self, record: Record, rank: int) -> Assignment:
        assert self._model is not None
        layout = record.layout
        host, port = self._store or ("", 0)
        exchange = ExchangeSpec(layout.exchange, self._config.exchange_timeout_s, MAILBOX_BYTES, host, port)
        generation = Generation(
            id=record.id,
            model=self._model.config,
            dtype=self._model.dtype,
            placement=layout.placement,
            exchange=exchange,
            page_bytes=layout.memory.page_bytes,
            block_tokens=self._config.engine.block_tokens,
        )
        node = node_pool(layout.seats[rank].node)
        return Assignment(generation, rank, self._extents(layout.device_pool(rank)), self._extents(node))

    def _extents(self, pool: str) -> PoolExtents:
        owner = self._pools[pool]
        return PoolExtents(pool, owner.address, self._config.token, owner.pages)

    async def _pool_status(self, name: str) -> PoolStatus:
        pool = self._pools[name]
        usage = await pool.handle.usage()
        return PoolStatus(name, pool.node, pool.config.page_bytes, pool.config.pages, usage)


def _told(error: Exception) -> str:
    """Our own errors speak for themselves; others need their type."""
    return str(error) if isinstance(error, ConcertinaError) else f"{type(error).__name__}: {error}"
