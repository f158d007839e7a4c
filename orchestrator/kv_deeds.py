"""Effects on KV caches: their size, and who takes over that of a device that leaves. Knows no Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ..errors import ConcertinaError, InternalError, Unreachable
from ..workers.generation import AT_SWITCH_BLOCKS, LEDGER_KEY, KVSource, kv_key
from ..workers.pages.holds import PagesHeld
from .cluster import Member, Pool
from .core.facts import HandOver, ResizeKV
from .core.layout import is_node_pool, node_of_pool
from .core.leftovers import heirs_at_switch
from .registry import Registry

T = TypeVar("T")
_log = logging.getLogger(__name__)
_HELD_PAUSE_S = 0.05  # before pages that somebody still maps are tried again
_LOOK_S = 0.5  # while KV is handed over, its deadline may become another one


@dataclass(frozen=True, slots=True)
class KVDeeds:
    """What is done to KV.

    Parameters
    ----------
    registry : Registry
    heirs : dict
        Devices that have the KV of others now, which left.
    granted : dict
        Devices that leave, and the last generation for whose switch an heir was told where their KV is.
    """

    registry: Registry
    heirs: dict[str, str] = field(default_factory=dict)
    granted: dict[str, int] = field(default_factory=dict)

    def inherits(self, worker: str) -> dict[str, KVSource]:
        """KV of devices that leave, by their names, which this worker takes over at the switch."""
        found = {}
        for device, heir in heirs_at_switch(self.registry.state()).items():
            pool = self.registry.pool_of_device(device)
            known = self.registry.cluster.pools.get(pool)
            if heir == worker and known is not None and kv_key(device) in known.pages:
                source = self._source(pool, known.pages[kv_key(device)])
                found[device] = replace(source, limit_s=self._left_s(self._deadline_s(device)))
                self.granted[device] = self.registry.record().id
        return found

    def heir_of(self, worker: str) -> str:
        """The device whose worker takes this one's running sequences over at the switch, if it leaves then."""
        state = self.registry.state()
        serving, member = state.serving, self.registry.worker(worker)
        if serving is None or worker not in serving.workers or member.report.load.kv_blocks_used > AT_SWITCH_BLOCKS:
            return ""
        device = serving.layout.devices[serving.rank_of(worker)]
        heir = heirs_at_switch(state).get(device)
        if heir is None or self.granted.get(device) != self.registry.record().id:
            return ""
        return serving.layout.devices[serving.rank_of(heir)]

    async def resize(self, effect: ResizeKV) -> None:
        """Extent, mapping and block count agree afterwards, whatever was left half done before."""
        worker = self.registry.worker(effect.worker)
        name = self.registry.pool_of_device(worker.report.device)
        pool, key = self.registry.pool(name), kv_key(worker.report.device)
        wanted = effect.blocks * self.registry.serving().layout.memory.kv_block_pages
        mapped, _ = await asyncio.gather(worker.handle.kv_pages(), pool.refresh())
        await self._claim(pool, key, mapped)
        extent = pool.pages.get(key, ())
        lack = wanted - len(extent)
        if lack > 0:
            extent = await pool.handle.extend(key, "kv", lack, len(extent))
        spare = _without(extent, mapped)
        mapped = await worker.handle.resize_kv(effect.blocks, spare[: max(0, wanted - len(mapped))])
        if len(mapped) != len(extent):
            await unheld(pool.handle.trim(key, mapped))

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

    async def hand_over(self, effect: HandOver) -> None:
        """What the heir has not taken at the switch; then the leaver is released, and what nobody wants freed.

        Nothing of that is done if the heir is lost, or stops before it has all: the core asks again, for who comes in
        its place.
        """
        self.heirs.pop(effect.device, None)  # of an earlier time
        members = self.registry.cluster.workers.values()
        leaver = next((m for m in members if m.report.retired and m.report.device == effect.device), None)
        heir = self.registry.cluster.workers.get(effect.heir)
        pages = self.registry.pool(effect.pool).pages.get(kv_key(effect.device), ()) if effect.pool else ()
        moved_to: str | None = ""
        if heir is None:
            moved_to = None
        elif pages:
            moved_to = await self._inherit(effect, heir, pages)
        elif effect.device in self.registry.serving().layout.devices:  # another worker has all of it
            moved_to = effect.device
        elif leaver is not None:
            moved_to = await self._inherited(leaver, heir)
        if moved_to is None:
            _log.warning(
                "KV of %s: %s is lost or has stopped; its hand-over is begun again", effect.device, effect.heir
            )
            await asyncio.sleep(_HELD_PAUSE_S)
            return
        if leaver is not None:
            await leaver.handle.release(moved_to)
        if effect.pool in self.registry.cluster.pools:
            await unheld(self.registry.pool(effect.pool).handle.free([kv_key(effect.device)]))

    def _source(self, pool: str, pages: tuple[int, ...]) -> KVSource:
        return KVSource(self.registry.extents(pool, (LEDGER_KEY,)), self.registry.pool(pool).source, pages)

    async def _inherit(self, effect: HandOver, heir: Member, pages: tuple[int, ...]) -> str | None:
        """The device that has the KV now; empty if it could not be had, then it is computed again.

        None if the heir has died or stopped before it had copied all. An owner that is lost raises: its successor has
        the same pages. So does an heir that cannot be reached: it may still be copying, and what it copies must not be
        freed.
        """
        pool, device = self.registry.pool(effect.pool), heir.report.device
        layout = self.registry.serving().layout
        blocks = layout.kv_blocks(layout.devices.index(device))
        source = self._source(effect.pool, pages)
        near = self.registry.pool_of_device(device) == effect.pool
        if near:  # first, so that nobody else can inherit them too; from now on it has them, or its successor
            await pool.handle.relabel(kv_key(effect.device), pages, kv_key(device))
        had = True
        try:
            left_s = self._left_s(self._deadline_s(effect.device))
            adopting = heir.handle.adopt_kv(source, blocks, left_s)
            await self.limited(heir, {effect.device: source}, adopting)
        except Unreachable:
            raise
        except ConcertinaError as e:
            _log.warning("KV of %s is not handed over to %s: %s", effect.device, device, e)
            had = near
        late = self._left_s(self._deadline_s(effect.device)) == 0.0
        if not near and not (had and late) and not await _serves(heir):
            return None
        if not had:
            return ""
        self.heirs[effect.device] = device
        return device

    async def _inherited(self, leaver: Member, heir: Member) -> str:
        """The device that a leaver's KV was given to before, by a hand-over that did not end; empty if none was."""
        device = heir.report.device
        name = self.registry.pool_of_device(device)
        if not is_node_pool(name) or node_of_pool(name) != leaver.node:
            return ""
        pool, layout = self.registry.pool(name), self.registry.serving().layout
        await pool.refresh()
        source = self._source(name, pool.pages.get(kv_key(device), ()))
        try:
            await heir.handle.adopt_kv(source, layout.kv_blocks(layout.devices.index(device)), None)
        except Unreachable:
            raise
        except ConcertinaError as e:
            _log.warning("KV of %s is mapped by nobody yet: %s", leaver.report.device, e)
        self.heirs[leaver.report.device] = device
        return device

    async def limited(self, heir: Member, sources: Mapping[str, KVSource], copying: Awaitable[T]) -> T:
        """What ``copying`` returns; deadlines of the devices that it copies from may become others meanwhile."""
        until_s = {device: self._deadline_s(device) for device in sources}
        task = asyncio.ensure_future(copying)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=_LOOK_S if sources else None)
                for device, source in sources.items():
                    if until_s[device] != self._deadline_s(device):
                        until_s[device] = self._deadline_s(device)
                        await heir.handle.limit_kv(source, self._left_s(until_s[device]))
            return await task
        finally:
            task.cancel()

    def _deadline_s(self, device: str) -> float | None:
        return self.registry.state().deadlines.get(device)

    def _left_s(self, until_s: float | None) -> float | None:
        return None if until_s is None else max(0.0, until_s - self.registry.cluster.hands.now_s())


async def _serves(heir: Member) -> bool:
    """Whether an heir makes steps still: one that has died or stopped copies no more."""
    try:
        report = await heir.handle.report()
    except Unreachable:
        raise
    except InternalError:
        return False
    return bool(report.serving) and not (report.parked or report.failed)


async def unheld(freeing: Awaitable[T]) -> T | None:
    """Pages that somebody still maps stay for now, and this returns None: the core asks again."""
    try:
        return await freeing
    except PagesHeld as e:
        _log.debug("%s; trying again", e)
        await asyncio.sleep(_HELD_PAUSE_S)
        return None


def _without(pages: Iterable[int], others: Iterable[int]) -> tuple[int, ...]:
    gone = set(others)
    return tuple(page for page in pages if page not in gone)
