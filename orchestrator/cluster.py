"""What the controller knows of its processes: who lives, what they hold and last said. Knows no Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from math import inf

from ..errors import InternalError, Unreachable
from ..workers.owner_roles import OwnerConfig, OwnerReport
from ..workers.pages.transfer import PageSource
from ..workers.roles import WorkerReport
from .core.facts import Abandon, Commit, Effect, Fault, Fill, Free, Park, PoolFact, Prepare, Snapshot, WorkerFact
from .hands import Hands, NodeInfo, OwnerHandle, WorkerHandle

_log = logging.getLogger(__name__)
_WATCH_S = 10.0
_PATIENCE_S = 0.25  # for the answer of a worker, before a decision is made without it
_RETRY_S = 1.0  # before one that could not be reached is called again
_RECENT_S = 0.1  # for which a process's word stands, unless something was done to it
_TELLING = (Abandon, Commit, Fill, Free, Park, Prepare)  # effects on one process, which says how it is afterwards


@dataclass(slots=True)
class Pool:
    """A memory owner, and what it last said."""

    node: str
    config: OwnerConfig
    handle: OwnerHandle
    source: PageSource
    pages: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    version: int = -1
    moved_bytes: int = 0
    counted_bytes: int = 0  # of these, in `Cluster.moved_bytes`
    asked: asyncio.Task[None] | None = None
    asked_s: float = 0.0
    known_s: float = -inf  # what is known of it is no older than that
    heard_s: float = -inf  # when it was last heard
    touched_s: float = -inf  # when something was last done to it whose outcome it did not tell
    unreached: str = ""  # why a call did not reach it, if one did not: then it has to be ended
    watch: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Ask for its extents, if they have changed, and what came into them."""
        self.take(await self.handle.report(self.version))

    def hear(self, told: OwnerReport, asked_s: float, now_s: float) -> None:
        """Take in the answer to what it was asked at ``asked_s``."""
        self.take(told)
        self.known_s, self.heard_s = max(self.known_s, asked_s), now_s

    def take(self, told: OwnerReport) -> None:
        if told.pages is not None and told.version > self.version:  # another answer may have come before this one
            self.version, self.pages = told.version, told.pages
        self.moved_bytes = max(self.moved_bytes, told.loaded_bytes + told.copied_bytes)

    def fact(self, now_s: float, hang_s: float, since_s: float) -> PoolFact:
        """What it last said, unless it hangs; stale if it owes an answer from before ``since_s``, or since a change."""
        failed = self.unreached or _hang(self.asked, now_s - self.asked_s, hang_s)
        stale = self.asked is not None and (self.asked_s < since_s or self.known_s < self.touched_s)
        return PoolFact(self.node, self.source.address, self.pages, failed, stale)


@dataclass(slots=True)
class Member:
    """A worker, what it last said, and what it had said at the last decision."""

    name: str
    node: str
    handle: WorkerHandle
    report: WorkerReport
    decided: WorkerReport | None = None
    asked: asyncio.Task[None] | None = None
    asked_s: float = 0.0
    known_s: float = -inf  # as a pool's
    heard_s: float = -inf
    touched_s: float = -inf
    unreached: str = ""

    def hear(self, told: WorkerReport, asked_s: float, now_s: float) -> None:
        """Take in the answer to what it was asked at ``asked_s``; a later report may have come before it."""
        if told.serial > self.report.serial:
            self.report = told
        self.known_s, self.heard_s = max(self.known_s, asked_s), now_s

    def fact(self, now_s: float, hang_s: float, nodes: Container[str] | None = None) -> WorkerFact:
        """What it last said, unless it hangs, or its node is not one of ``nodes`` (None: any)."""
        report = self.report
        failed = report.failed or self.unreached or _hang(self.asked, now_s - self.asked_s, hang_s)
        if nodes is not None and self.node not in nodes:
            failed = f"node {self.node} is gone"
        return WorkerFact(
            self.node,
            report.prepared,
            report.serving,
            report.parked,
            report.retired,
            report.device,
            report.kv_blocks,
            failed,
            stale=self.asked is not None,
            joining=report.joining,
            abandoned=report.abandoned,
        )


@dataclass(slots=True)
class Cluster:
    """Nodes, owners and workers of one deployment; dead ones vanish by themselves.

    Parameters
    ----------
    hands : Hands
    hang_s : float
        A worker or owner without an answer for so long has failed.
    changed : callable
        Called when somebody died or said something new.
    """

    hands: Hands
    hang_s: float
    changed: Callable[[], None]
    nodes: dict[str, NodeInfo] = field(default_factory=dict)
    pools: dict[str, Pool] = field(default_factory=dict)
    workers: dict[str, Member] = field(default_factory=dict)
    store: tuple[str, int] | None = None
    _lost_pools: dict[str, Pool] = field(default_factory=dict)  # of nodes that are gone: those may be back
    _watches: set[asyncio.Task[None]] = field(default_factory=set)
    _moved_bytes: int = 0

    async def add_pool(self, name: str, node: str, handle: OwnerHandle) -> Pool:
        """Take note of an owner that lives."""
        config, source = await asyncio.gather(handle.config(), handle.source())
        pool = Pool(node, config, handle, source)
        await pool.refresh()
        self._know(name, pool)
        return pool

    def _know(self, name: str, pool: Pool) -> None:
        self.pools[name] = pool
        if pool.watch is None or pool.watch.done():
            pool.watch = self._watch(self._watch_owner(name, pool))

    async def add_worker(self, name: str, node: str, handle: WorkerHandle) -> Member:
        """Take note of a worker that lives."""
        self.workers[name] = member = Member(name, node, handle, await handle.report())
        self._watch(self._watch_worker(member))
        return member

    def add_lost(self, name: str, node: str, handle: WorkerHandle, why: str) -> None:
        """Take note of a worker that may live, and has to be ended."""
        report = WorkerReport(name, 0, frozenset(), 0, "")
        self.workers[name] = Member(name, node, handle, report, unreached=why)

    async def look(self, busy: frozenset[Effect], errors: Mapping[Effect, Fault]) -> Snapshot:
        """Ask whoever may have something new to say; one that does not answer at once is taken at its last word."""
        since_s = self.hands.now_s()
        await self.ask(_RECENT_S)
        now_s = self.hands.now_s()
        for member in self.workers.values():
            member.decided = member.report
        return Snapshot(
            nodes=frozenset(self.nodes),
            pools={name: pool.fact(now_s, self.hang_s, since_s) for name, pool in self.pools.items()},
            workers={name: m.fact(now_s, self.hang_s, self.nodes) for name, m in self.workers.items()},
            store=self.store,
            busy=busy,
            errors=dict(errors),
            now_s=now_s,
        )

    def touch(self, effect: Effect, *, failed: bool = False) -> None:
        """An effect has ended: everybody may have news, unless whom it was done to has told them."""
        if failed or not isinstance(effect, _TELLING):
            everybody: list[Member | Pool] = [*self.workers.values(), *self.pools.values()]
            for process in everybody:
                process.touched_s = self.hands.now_s()

    async def ask(self, recent_s: float = 0.0) -> None:
        """Have every report and every pool's extents anew, as far as they come at once.

        A word of the last ``recent_s`` seconds stands, unless something was done to who gave it.
        """
        now_s = self.hands.now_s()

        def silent(process: Member | Pool) -> bool:
            known = process.known_s > process.touched_s and now_s - process.heard_s < recent_s
            return process.asked is None and not known and not process.unreached

        for member in filter(silent, self.workers.values()):
            member.asked_s = now_s
            member.asked = asyncio.create_task(self._ask(member))
        for name, pool in self.pools.items():
            if silent(pool):
                pool.asked_s = now_s
                pool.asked = asyncio.create_task(self._ask_owner(name, pool))
        processes: list[Member | Pool] = [*self.workers.values(), *self.pools.values()]
        asked = [each.asked for each in processes if each.asked is not None and each.node in self.nodes]
        if asked:
            await asyncio.wait(asked, timeout=_PATIENCE_S)

    async def _ask_owner(self, name: str, pool: Pool) -> None:
        try:
            told = await pool.handle.report(pool.version)
            pool.hear(told, pool.asked_s, self.hands.now_s())
        except Unreachable as e:
            self._unreached(pool, e)
            return
        except InternalError as e:
            self._lost_owner(name, pool, e)
            return
        finally:
            pool.asked = None
        if self.hands.now_s() - pool.asked_s > _PATIENCE_S:
            self.changed()  # a decision was made without this

    @property
    def moved_bytes(self) -> int:
        """Bytes that came from the checkpoint and from peers, as owners last said, also those that are gone now."""
        for pool in self.pools.values():
            self._moved_bytes += pool.moved_bytes - pool.counted_bytes
            pool.counted_bytes = pool.moved_bytes
        return self._moved_bytes

    async def look_at_nodes(self, *, anew: bool = False) -> None:
        self.nodes = {node.id: node for node in await self.hands.nodes(anew=anew)}
        for name, pool in list(self.pools.items()):
            if pool.node not in self.nodes:
                _log.warning("memory owner %s is lost: node %s is gone", name, pool.node)
                self._lost_pools[name] = self.pools.pop(name)
        for name, pool in list(self._lost_pools.items()):
            if pool.node in self.nodes:  # it was silent; what is there has to be used or given back
                del self._lost_pools[name]
                if name not in self.pools:
                    self._know(name, pool)

    def forget_worker(self, name: str) -> None:
        self.workers.pop(name, None)

    def forget_pool(self, name: str, pool: Pool) -> None:
        """Unless another owner has taken it over meanwhile."""
        if self.pools.get(name) is pool:
            del self.pools[name]

    def close(self) -> None:
        for task in self._watches:
            task.cancel()

    async def _ask(self, member: Member) -> None:
        try:
            member.hear(await member.handle.report(), member.asked_s, self.hands.now_s())
        except Unreachable as e:
            self._unreached(member, e)
        except InternalError as e:
            self._lost(member, e)
        except Exception as e:  # noqa: BLE001 - a worker that cannot say how it is is replaced
            _log.exception("worker %s: no report", member.name)
            member.report = replace(member.report, failed=f"{type(e).__name__}: {e}")
        finally:
            member.asked = None
        if self.hands.now_s() - member.asked_s > _PATIENCE_S:
            self.changed()  # a decision was made without this

    async def _watch_worker(self, member: Member) -> None:
        seen = member.report
        while self.workers.get(member.name) is member:
            asked_s = self.hands.now_s()
            try:
                told = await member.handle.watch(seen, _WATCH_S)
            except Unreachable as e:
                self._unreached(member, e)
                await asyncio.sleep(_RETRY_S)
                continue
            except InternalError as e:
                self._lost(member, e)
                return
            member.hear(told, asked_s, self.hands.now_s())
            if told.situation != seen.situation:
                seen = told
                if member.decided is None or member.decided.situation != told.situation:
                    self.changed()

    def _unreached(self, process: Member | Pool, error: Unreachable) -> None:
        """It may live, and map and write what its successor will: it must be ended, even if it is heard again."""
        if not process.unreached:
            process.unreached = str(error)
            self.changed()

    def _lost(self, member: Member, error: InternalError) -> None:
        if self.workers.get(member.name) is member:
            _log.warning("%s is lost: %s", member.name, str(error).removeprefix(f"{member.name}: "))
            del self.workers[member.name]
            self.changed()

    async def _watch_owner(self, name: str, pool: Pool) -> None:
        while self.pools.get(name) is pool:
            try:
                await pool.handle.wait(_WATCH_S)
            except Unreachable as e:
                self._unreached(pool, e)
                await asyncio.sleep(_RETRY_S)
            except InternalError as e:
                self._lost_owner(name, pool, e)
                return

    def _lost_owner(self, name: str, pool: Pool, error: InternalError) -> None:
        if self.pools.get(name) is pool:
            _log.warning("memory owner %s is lost: %s", name, error)
            self.forget_pool(name, pool)
            self.changed()

    def _watch(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)
        return task


def _hang(asked: asyncio.Task[None] | None, late_s: float, hang_s: float) -> str:
    """Why a process that has been asked counts as hung; empty if it does not."""
    return f"gave no answer for {late_s:.0f} s" if asked is not None and late_s > hang_s else ""
