"""Carries out the core's effects on the cluster. Knows no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ..errors import ConcertinaError, InternalError, OperatorError, Unreachable
from ..workers.engine.scheduler import SchedulerConfig
from ..workers.generation import Assignment, ExchangeSpec, Generation, KVSource
from ..workers.model_files import ModelFiles
from ..workers.owner_roles import OwnerConfig
from ..workers.pages.transfer import CopyPlan
from ..workers.roles import WorkerConfig, WorkerReport
from .cluster import Cluster, Member, Pool
from .config import DeploymentConfig
from .core.facts import (
    Abandon,
    Commit,
    Effect,
    Fill,
    Free,
    HandOver,
    OpenStore,
    Park,
    Prepare,
    ResizeKV,
    StartOwner,
    StartWorker,
    StopOwner,
    StopWorker,
)
from .core.layout import is_node_pool, node_pool
from .core.state import Record
from .kv_deeds import KVDeeds, unheld
from .planning import MAILBOX_BYTES, max_model_len
from .registry import Registry
from .starting import started

_LAST_WORD_S = 0.25
_WEIGHTS = ("experts", "trunk")


@dataclass(frozen=True, slots=True, eq=False)
class _Filling:
    """A pool that takes in weights, and the `Pool.moved_bytes` at which it has them."""

    pool: Pool
    until_bytes: int

    @property
    def left_bytes(self) -> int:
        return max(0, self.until_bytes - self.pool.moved_bytes)


@dataclass
class Deeds:
    """The effects of one deployment.

    Parameters
    ----------
    model : ModelFiles
    registry : Registry
    kv : KVDeeds
    wanted_bytes : int
        Bytes of weights that were asked for so far, but for those that did not come.
    """

    model: ModelFiles
    registry: Registry
    kv: KVDeeds
    wanted_bytes: int = 0
    _filling: list[_Filling] = field(default_factory=list)

    @property
    def coming_bytes(self) -> int:
        """Bytes of weights that were asked for and are not there yet."""
        return sum(filling.left_bytes for filling in self._filling)

    @property
    def _config(self) -> DeploymentConfig:
        return self.registry.config

    @property
    def _cluster(self) -> Cluster:
        return self.registry.cluster

    def do(self, effect: Effect) -> Awaitable[None]:
        """Carry an effect out.

        Raises
        ------
        ConcertinaError
            It failed; `OperatorError` if trying again cannot help.
        """
        match effect:
            case StartOwner():
                return self._start_owner(effect)
            case StopOwner():
                return self._stop_owner(effect)
            case StartWorker():
                return self._start_worker(effect)
            case Fill():
                return self._fill(effect)
            case OpenStore():
                return self._open_store()
            case ResizeKV():
                return self.kv.resize(effect)
            case Prepare():
                return self._prepare(effect)
            case Commit():
                member = self.registry.worker(effect.worker)
                return self._told(member, member.handle.commit(effect.generation, self.kv.heir_of(effect.worker)))
            case Abandon():
                member = self.registry.worker(effect.worker)
                return self._told(member, member.handle.abandon(effect.generation))
            case Park():
                member = self.registry.worker(effect.worker)
                return self._told(member, member.handle.park(effect.generation))
            case HandOver():
                return self.kv.hand_over(effect)
            case StopWorker():
                return self._stop_worker(effect)
            case Free():
                return self._free(effect)

    async def _start_owner(self, effect: StartOwner) -> None:
        layout = self.registry.record().layout
        config = OwnerConfig(
            f"{self._config.name}/{effect.pool}",
            effect.pages,
            layout.memory.page_bytes,
            self._config.token,
            host=self.registry.node_host(effect.node),
            ledger_record_bytes=layout.ledger_record_bytes,
            keep=not is_node_pool(effect.pool),
            reserve=self._config.reserve_memory and not is_node_pool(effect.pool),
        )
        for lender in list(self._cluster.workers.values()):
            if lender.node == effect.node and await self._adopt(effect, config, lender):
                return
        await self._new_owner(effect, config)

    async def _adopt(self, effect: StartOwner, config: OwnerConfig, lender: Member) -> bool:
        """Whether a new owner took the pool over from this worker; an empty one beside a pool in use must not be."""
        try:
            address = await lender.handle.lend(effect.pool)
        except Unreachable:
            raise  # it may live, and map the pool
        except InternalError:
            return False  # it has died
        if address is None:
            return False
        try:
            await self._new_owner(effect, config, address)
        except ConcertinaError as e:
            await self._cluster.hands.kill(config.name)
            kind = OperatorError if isinstance(e, OperatorError) else InternalError
            raise kind(f"pool {effect.pool} was not adopted from {lender.name}: {e}") from e
        return True

    async def _new_owner(self, effect: StartOwner, config: OwnerConfig, adopt_from: str | None = None) -> None:
        async def answering() -> None:
            handle = await self._cluster.hands.start_owner(effect.node, config, adopt_from)
            await self._cluster.add_pool(effect.pool, effect.node, handle)

        what = f"memory owner {effect.pool} on node {effect.node}"
        await started(self._cluster.hands, what, config.name, self._config.start_timeout_s, answering())

    async def _stop_owner(self, effect: StopOwner) -> None:
        pool = self.registry.pool(effect.pool)
        await self._cluster.hands.kill(pool.config.name)
        self._cluster.forget_pool(effect.pool, pool)

    async def _start_worker(self, effect: StartWorker) -> None:
        engine = self._config.engine
        scheduler = SchedulerConfig(
            max_model_len=max_model_len(self._config, self.model),
            max_batched_tokens=engine.max_batched_tokens,
            max_running=engine.max_running,
            max_waiting=engine.max_waiting,
            chunked_prefill=engine.chunked_prefill,
        )
        config = WorkerConfig(
            name=effect.worker,
            host=self.registry.node_host(effect.node),
            token=self._config.token,
            threads=self._threads(effect.node),
            scheduler=scheduler,
            prefix_caching=engine.prefix_caching,
            emulated_step_ms=engine.emulated_step_ms,
        )

        async def answering() -> None:
            handle = await self._cluster.hands.start_worker(effect.node, config)
            await self._cluster.add_worker(effect.worker, effect.node, handle)

        what = f"{effect.worker} on node {effect.node}"
        try:
            await started(self._cluster.hands, what, config.name, self._config.start_timeout_s, answering())
        except ConcertinaError:  # the next one has another name: nobody would know of this one's process
            await self._cluster.hands.kill(config.name)
            raise

    async def _fill(self, effect: Fill) -> None:
        pool = self.registry.pool(effect.pool)
        keys = [r.key for r in effect.requests if r.purpose in _WEIGHTS and r.key not in pool.pages]
        pieces = list(self.model.pieces(keys))
        copies = self._copies(effect.pool, keys)
        copied = {plan.key for plan in copies}
        wanted_bytes = sum(len(plan.pages) for plan in copies) * pool.config.page_bytes
        wanted_bytes += sum(p.source.nbytes for p in pieces if p.key not in copied)
        filling = _Filling(pool, pool.moved_bytes + wanted_bytes)
        self._filling.append(filling)
        self.wanted_bytes += wanted_bytes
        asked_s = self._cluster.hands.now_s()
        try:
            told = await pool.handle.fill(effect.requests, pieces, copies, pool.version)
        except ConcertinaError:
            with suppress(ConcertinaError, TimeoutError):  # one that is lost has said its last
                async with asyncio.timeout(_LAST_WORD_S):
                    await pool.refresh()
            self.wanted_bytes -= filling.left_bytes  # it will be asked for anew
            raise
        finally:
            self._filling.remove(filling)
        pool.hear(told, asked_s, self._cluster.hands.now_s())

    def _copies(self, pool: str, keys: Sequence[str]) -> list[CopyPlan]:
        """Each extent from the peer that has it, will keep it, and has least to give so far."""
        pools, kept = self._cluster.pools, self.registry.wanted()
        plans, given = [], dict.fromkeys(pools, 0)
        for key in keys:
            peers = [n for n, p in pools.items() if n != pool and key in p.pages and key in kept.get(n, ())]
            if peers:
                peer = min(peers, key=lambda name: (given[name], name))
                given[peer] += 1
                plans.append(CopyPlan(key, pools[peer].source, pools[peer].pages[key]))
        return plans

    async def _open_store(self) -> None:
        self._cluster.store = await self._cluster.hands.open_store()

    async def _prepare(self, effect: Prepare) -> None:
        record = self.registry.record()
        inherits = self.kv.inherits(effect.worker)
        assignment = self._assignment(record, record.rank_of(effect.worker), tuple(inherits.values()))
        member = self.registry.worker(effect.worker)
        await self._told(member, self.kv.limited(member, inherits, member.handle.prepare(assignment)))

    async def _told(self, member: Member, doing: Awaitable[WorkerReport]) -> None:
        """A worker says how it is when it has done something: it need not be asked."""
        asked_s = self._cluster.hands.now_s()
        member.hear(await doing, asked_s, self._cluster.hands.now_s())

    async def _stop_worker(self, effect: StopWorker) -> None:
        await self._cluster.hands.kill(effect.worker)
        self._cluster.forget_worker(effect.worker)

    async def _free(self, effect: Free) -> None:
        pool, asked_s = self.registry.pool(effect.pool), self._cluster.hands.now_s()
        if told := await unheld(pool.handle.free(effect.keys, pool.version)):
            pool.hear(told, asked_s, self._cluster.hands.now_s())

    def _assignment(self, record: Record, rank: int, inherits: tuple[KVSource, ...]) -> Assignment:
        layout = record.layout
        host, port = self._cluster.store or ("", 0)
        exchange = ExchangeSpec(layout.exchange, self._config.exchange_timeout_s, MAILBOX_BYTES, host, port)
        generation = Generation(
            id=record.id,
            model=self.model.config,
            dtype=self.model.dtype,
            placement=layout.placement,
            exchange=exchange,
            page_bytes=layout.memory.page_bytes,
            block_tokens=self._config.engine.block_tokens,
        )
        node = layout.seats[rank].node
        device = self.registry.extents(layout.device_pool(rank))
        host = self.registry.node_host(node)
        shared = self.registry.extents(node_pool(node))
        return Assignment(generation, rank, device, shared, self._threads(node), host, inherits)

    def _threads(self, node: str) -> int:
        beside = sum(seat.node == node for seat in self.registry.record().layout.seats)
        return self._config.engine.threads or max(1, self._cluster.nodes[node].cpus // max(1, beside))
