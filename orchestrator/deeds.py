"""Carries out the core's effects on the cluster. Knows no Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ..errors import ConcertinaError, InternalError, OperatorError
from ..workers.engine.scheduler import SchedulerConfig
from ..workers.generation import LEDGER_KEY, Assignment, ExchangeSpec, Generation, KVSource, PoolExtents, kv_key
from ..workers.model_files import ModelFiles
from ..workers.owner import OwnerConfig
from ..workers.pages.holds import PagesHeld
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
    Prepare,
    ResizeKV,
    StartOwner,
    StartWorker,
    StopOwner,
    StopWorker,
)
from .core.layout import is_node_pool, node_pool
from .core.leftovers import heirs_at_switch
from .core.state import Record, State
from .planning import MAILBOX_BYTES, max_model_len
from .starting import started

T = TypeVar("T")
_log = logging.getLogger(__name__)
_WEIGHTS = ("experts", "trunk")
_HELD_PAUSE_S = 0.05  # before pages that somebody still maps are tried again


@dataclass
class Deeds:
    """The effects of one deployment.

    Parameters
    ----------
    config : DeploymentConfig
    model : ModelFiles
    cluster : Cluster
    state : callable
        The state that effects are for.
    heirs : dict
        Devices that have the KV of others now, which left.
    """

    config: DeploymentConfig
    model: ModelFiles
    cluster: Cluster
    state: Callable[[], State]
    heirs: dict[str, str] = field(default_factory=dict)
    wanted_bytes: int = 0

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
                return self._resize_kv(effect)
            case Prepare():
                return self._prepare(effect)
            case Commit():
                member = self._worker(effect.worker)
                return self._told(member, member.handle.commit(effect.generation, self._heir_of(effect.worker)))
            case Abandon():
                member = self._worker(effect.worker)
                return self._told(member, member.handle.abandon(effect.generation))
            case HandOver():
                return self._hand_over(effect)
            case StopWorker():
                return self._stop_worker(effect)
            case Free():
                return self._free(effect)

    async def _start_owner(self, effect: StartOwner) -> None:
        layout = self._record().layout
        config = OwnerConfig(
            f"{self.config.name}/{effect.pool}",
            effect.pages,
            layout.memory.page_bytes,
            self.config.token,
            host=self._node_host(effect.node),
            ledger_record_bytes=layout.ledger_record_bytes,
            reserve=self.config.reserve_memory and not is_node_pool(effect.pool),
        )
        for lender in list(self.cluster.workers.values()):
            if lender.node == effect.node and await self._adopt(effect, config, lender):
                return
        await self._new_owner(effect, config)

    async def _adopt(self, effect: StartOwner, config: OwnerConfig, lender: Member) -> bool:
        """Whether a new owner took the pool over from this worker; an empty one beside a pool in use must not be."""
        try:
            address = await lender.handle.lend(effect.pool)
        except InternalError:
            return False  # it does not map that pool
        try:
            await self._new_owner(effect, config, address)
        except ConcertinaError as e:
            await self.cluster.hands.kill(config.name)
            raise InternalError(f"pool {effect.pool} was not adopted from {lender.name}: {e}") from e
        return True

    async def _new_owner(self, effect: StartOwner, config: OwnerConfig, adopt_from: str | None = None) -> None:
        async def answering() -> None:
            handle = await self.cluster.hands.start_owner(effect.node, config, adopt_from)
            await self.cluster.add_pool(effect.pool, effect.node, handle)

        what = f"memory owner {effect.pool} on node {effect.node}"
        await started(self.cluster.hands, what, config.name, self.config.start_timeout_s, answering())

    async def _stop_owner(self, effect: StopOwner) -> None:
        pool = self._pool(effect.pool)
        await self.cluster.hands.kill(pool.config.name)
        self.cluster.forget_pool(effect.pool, pool)

    async def _start_worker(self, effect: StartWorker) -> None:
        engine = self.config.engine
        scheduler = SchedulerConfig(
            max_model_len=max_model_len(self.config, self.model),
            max_batched_tokens=engine.max_batched_tokens,
            max_running=engine.max_running,
            max_waiting=engine.max_waiting,
            chunked_prefill=engine.chunked_prefill,
        )
        config = WorkerConfig(
            name=effect.worker,
            host=self._node_host(effect.node),
            token=self.config.token,
            threads=self._threads(effect.node),
            scheduler=scheduler,
            prefix_caching=engine.prefix_caching,
            emulated_step_ms=engine.emulated_step_ms,
        )

        async def answering() -> None:
            handle = await self.cluster.hands.start_worker(effect.node, config)
            await self.cluster.add_worker(effect.worker, effect.node, handle)

        what = f"{effect.worker} on node {effect.node}"
        await started(self.cluster.hands, what, config.name, self.config.start_timeout_s, answering())

    async def _fill(self, effect: Fill) -> None:
        pool = self._pool(effect.pool)
        keys = [r.key for r in effect.requests if r.purpose in _WEIGHTS and r.key not in pool.pages]
        pieces = list(self.model.pieces(keys))
        self.wanted_bytes += sum(p.dest_bytes for p in pieces)
        asked_s = self.cluster.hands.now_s()
        told = await pool.handle.fill(effect.requests, pieces, self._copies(effect.pool, keys), pool.version)
        pool.hear(told, asked_s, self.cluster.hands.now_s())

    def _copies(self, pool: str, keys: Sequence[str]) -> list[CopyPlan]:
        """Each extent from the peer that has it and has least to give so far."""
        plans, given = [], dict.fromkeys(self.cluster.pools, 0)
        for key in keys:
            peers = [name for name, p in self.cluster.pools.items() if name != pool and key in p.pages]
            if peers:
                peer = min(peers, key=lambda name: (given[name], name))
                given[peer] += 1
                plans.append(CopyPlan(key, self.cluster.pools[peer].source, self.cluster.pools[peer].pages[key]))
        return plans

    async def _open_store(self) -> None:
        self.cluster.store = await self.cluster.hands.open_store()

    async def _prepare(self, effect: Prepare) -> None:
        record = self._record()
        assignment = self._assignment(record, record.rank_of(effect.worker))
        member = self._worker(effect.worker)
        await self._told(member, member.handle.prepare(assignment))

    async def _told(self, member: Member, doing: Awaitable[WorkerReport]) -> None:
        """A worker says how it is when it has done something: it need not be asked."""
        asked_s = self.cluster.hands.now_s()
        member.hear(await doing, asked_s, self.cluster.hands.now_s())

    def _inherits(self, worker: str) -> tuple[KVSource, ...]:
        """KV of devices that leave, which this worker takes over at the switch."""
        found = []
        for device, heir in heirs_at_switch(self.state()).items():
            pool = self._pool_of_device(device)
            known = self.cluster.pools.get(pool)
            if heir == worker and known is not None and kv_key(device) in known.pages:
                found.append(KVSource(self._extents(pool, (LEDGER_KEY,)), known.source, known.pages[kv_key(device)]))
        return tuple(found)

    def _heir_of(self, worker: str) -> str:
        """The device whose worker takes this one's running sequences over at the switch, if it leaves then."""
        state = self.state()
        serving = state.serving
        if serving is None or worker not in serving.workers:
            return ""
        heir = heirs_at_switch(state).get(serving.layout.devices[serving.rank_of(worker)])
        return "" if heir is None else serving.layout.devices[serving.rank_of(heir)]

    async def _resize_kv(self, effect: ResizeKV) -> None:
        """Extent, mapping and block count agree afterwards, whatever was left half done before."""
        worker = self._worker(effect.worker)
        name = self._pool_of_device(worker.report.device)
        pool, key = self._pool(name), kv_key(worker.report.device)
        wanted = effect.blocks * self._serving().layout.memory.kv_block_pages
        mapped, _ = await asyncio.gather(worker.handle.kv_pages(), pool.refresh())
        await self._claim(pool, key, mapped)
        extent = pool.pages.get(key, ())
        lack = wanted - len(extent)
        if lack > 0:
            extent = await pool.handle.extend(key, "kv", lack, len(extent))
        spare = _without(extent, mapped)
        mapped = await worker.handle.resize_kv(effect.blocks, spare[: max(0, wanted - len(mapped))])
        if len(mapped) != len(extent):
            await self._unheld(pool.handle.trim(key, mapped))

    async def _claim(self, pool: Pool, key: str, mapped: Iterable[int]) -> None:
        """Pages that a device maps belong to its extent, also those that it took over from another one."""
        mine, claimed = set(mapped), False
        for other, pages in pool.pages.items():
            taken = [page for page in pages if page in mine]
            if other != key and other.startswith(kv_key("")) and taken:
                await pool.handle.relabel(other, taken, key)
                claimed = True
        if claimed:
            await pool.refresh()

    async def _hand_over(self, effect: HandOver) -> None:
        self.heirs.pop(effect.device, None)  # of an earlier time
        members = self.cluster.workers.values()
        leaver = next((m for m in members if m.report.retired and m.report.device == effect.device), None)
        heir = self.cluster.workers.get(effect.heir)
        pages = self.cluster.pools[effect.pool].pages.get(kv_key(effect.device), ()) if effect.pool else ()
        moved_to = ""
        if heir is not None and pages:
            moved_to = await self._inherit(effect, heir, pages)
        if leaver is not None:
            await leaver.handle.release(moved_to)
        if effect.pool in self.cluster.pools:
            await self._unheld(self._pool(effect.pool).handle.free([kv_key(effect.device)]))

    async def _inherit(self, effect: HandOver, heir: Member, pages: tuple[int, ...]) -> str:
        """The device that has the KV now; empty if it could not be had in time, then it is computed again.

        An owner that is lost raises: its successor has the same pages.
        """
        pool, device = self._pool(effect.pool), heir.report.device
        layout = self._serving().layout
        blocks = layout.kv_blocks(layout.devices.index(device))
        source = KVSource(self._extents(effect.pool, (LEDGER_KEY,)), pool.source, pages)
        until_s = self.state().deadlines.get(effect.device)
        left_s = None if until_s is None else max(0.0, until_s - self.cluster.hands.now_s())
        if self._pool_of_device(device) == effect.pool:  # first, so that nobody else can inherit them too
            await pool.handle.relabel(kv_key(effect.device), pages, kv_key(device))
        try:
            await asyncio.wait_for(heir.handle.adopt_kv(source, blocks), left_s)
        except (ConcertinaError, TimeoutError) as e:
            _log.warning("KV of %s is not handed over to %s: %s", effect.device, device, e or "too late")
            return ""
        self.heirs[effect.device] = device
        return device

    async def _stop_worker(self, effect: StopWorker) -> None:
        await self.cluster.hands.kill(effect.worker)
        self.cluster.forget_worker(effect.worker)

    async def _free(self, effect: Free) -> None:
        pool, asked_s = self._pool(effect.pool), self.cluster.hands.now_s()
        if told := await self._unheld(pool.handle.free(effect.keys, pool.version)):
            pool.hear(told, asked_s, self.cluster.hands.now_s())

    async def _unheld(self, freeing: Awaitable[T]) -> T | None:
        """Pages that somebody still maps stay for now, and this returns None: the core asks again."""
        try:
            return await freeing
        except PagesHeld as e:
            _log.debug("%s; trying again", e)
            await asyncio.sleep(_HELD_PAUSE_S)
            return None

    def _assignment(self, record: Record, rank: int) -> Assignment:
        layout = record.layout
        host, port = self.cluster.store or ("", 0)
        exchange = ExchangeSpec(layout.exchange, self.config.exchange_timeout_s, MAILBOX_BYTES, host, port)
        generation = Generation(
            id=record.id,
            model=self.model.config,
            dtype=self.model.dtype,
            placement=layout.placement,
            exchange=exchange,
            page_bytes=layout.memory.page_bytes,
            block_tokens=self.config.engine.block_tokens,
        )
        node = layout.seats[rank].node
        device = self._extents(layout.device_pool(rank))
        host = self._node_host(node)
        inherits = self._inherits(record.workers[rank])
        return Assignment(generation, rank, device, self._extents(node_pool(node)), self._threads(node), host, inherits)

    def _extents(self, pool: str, keys: Sequence[str] | None = None) -> PoolExtents:
        known = self._pool(pool)
        pages = known.pages if keys is None else {key: known.pages[key] for key in keys if key in known.pages}
        return PoolExtents(pool, known.source.address, self.config.token, pages)

    def _threads(self, node: str) -> int:
        beside = sum(seat.node == node for seat in self._record().layout.seats)
        return self.config.engine.threads or max(1, self.cluster.nodes[node].cpus // max(1, beside))

    def _node_host(self, node: str) -> str:
        if node not in self.cluster.nodes:
            raise InternalError(f"node {node} is gone")
        return self.cluster.nodes[node].host

    def _record(self) -> Record:
        """The generation that is coming, else the one that serves."""
        state = self.state()
        record = state.pending.record if state.pending is not None else state.serving
        if record is None:
            raise InternalError("there is no generation")
        return record

    def _serving(self) -> Record:
        serving = self.state().serving
        if serving is None:
            raise InternalError("no generation serves")
        return serving

    def _pool_of_device(self, device: str) -> str:
        layout = self._serving().layout
        if device not in layout.devices:
            raise InternalError(f"device {device} has no part in generation {self._serving().id}")
        return layout.device_pool(layout.devices.index(device))

    def _pool(self, name: str) -> Pool:
        if name not in self.cluster.pools:
            raise InternalError(f"memory owner {name}: its process ended")
        return self.cluster.pools[name]

    def _worker(self, name: str) -> Member:
        if name not in self.cluster.workers:
            raise InternalError(f"{name}: its process ended")
        return self.cluster.workers[name]


def fault_is_lasting(error: Exception) -> bool:
    """Whether an effect that ended so would end so again."""
    return isinstance(error, OperatorError)


def _without(pages: Iterable[int], others: Iterable[int]) -> tuple[int, ...]:
    gone = set(others)
    return tuple(page for page in pages if page not in gone)
