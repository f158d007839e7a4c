"""What effects do to the KV of a simulated cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from concertina.orchestrator.core.facts import HandOver, ResizeKV
from concertina.workers.generation import kv_key

from .core_calls import BETWEEN, CALLED, Deed, answering, answering_owner, kv_of
from .core_processes import KV, Pool, Worker, must

if TYPE_CHECKING:
    from .core_world import World


def resize_kv(world: World, effect: ResizeKV) -> Deed:
    yield CALLED
    worker = yield from answering(world, effect.worker)
    kv = kv_of(worker)
    yield BETWEEN
    _claim((yield from answering_owner(world, kv.pool.name)), kv)
    yield BETWEEN
    pool, key = (yield from answering_owner(world, kv.pool.name)), kv_key(kv.device)
    wanted = effect.blocks * kv.block_pages
    if wanted > pool.extents.get(key, 0):
        pool.take(wanted - pool.extents.get(key, 0))
        pool.extents[key] = wanted
    yield BETWEEN
    yield CALLED
    worker = yield from answering(world, effect.worker)
    kv_of(worker).own = min(wanted, pool.extents.get(key, 0))
    yield BETWEEN
    pool = yield from answering_owner(world, kv.pool.name)
    pool.extents[key] = kv.own


def _claim(pool: Pool, kv: KV) -> None:
    """Pages that a device maps belong to its extent."""
    for key, pages in kv.foreign.items():
        pool.extents[key] -= pages
        if not pool.extents[key]:
            del pool.extents[key]
        pool.extents[kv_key(kv.device)] = pool.extents.get(kv_key(kv.device), 0) + pages
        kv.own += pages
    kv.foreign.clear()


def hand_over(world: World, effect: HandOver) -> Deed:
    key = kv_key(effect.device)
    yield BETWEEN
    heir, pool = world.workers.get(effect.heir), world.owners.get(effect.pool)
    if heir is None:
        return  # it is begun again
    if pool is not None and key in pool.extents:
        yield from _inherit(world, heir, pool, key)
    yield BETWEEN
    for leaver in list(world.workers.values()):
        if leaver.retired and leaver.kv is not None and leaver.kv.device == effect.device:
            yield CALLED
            leaver = yield from answering(world, leaver.name)
            leaver.part, leaver.retired = None, 0
            leaver.prepared.clear()
            leaver.let_go_if_idle()
    yield BETWEEN
    if effect.pool:
        yield from answering_owner(world, effect.pool)
        world.free(effect.pool, [key])


def take_over(world: World, heir: Worker, device: str) -> None:
    """As its device leaves: the heir maps what running sequences have, if it is in the same pool."""
    kv, key = heir.kv, kv_key(device)
    if kv is not None and key in kv.pool.extents:
        others = [w for w in world.workers.values() if w is not heir and w.kv is not None and key in w.kv.foreign]
        must(not others, f"C12: {heir.name} takes over {key} at the switch, which {others} did already")
        taken = world.order.randint(0, kv.pool.extents[key] // kv.block_pages) * kv.block_pages
        if taken:
            kv.foreign[key] = taken


def _inherit(world: World, heir: Worker, pool: Pool, key: str) -> Deed:
    """Adopting in the same pool: pages of the leaver are mapped instead of some of its own, and a few more."""
    yield CALLED
    while world.workers.get(heir.name) is heir and heir.hung_since_s is not None:
        yield CALLED
    kv = heir.kv
    if world.workers.get(heir.name) is not heir or kv is None or not heir.serving:
        return  # without it, then
    if kv.pool is pool and kv.device != key.removeprefix("kv/"):
        others = [w for w in world.workers.values() if w is not heir and w.kv is not None and key in w.kv.foreign]
        must(not others, f"C12: {heir.name} takes over {key}, which {others} did already")
        taken = world.order.randint(0, pool.extents.get(key, 0) // kv.block_pages) * kv.block_pages
        if taken > kv.foreign.get(key, 0):
            kv.foreign[key] = taken
            kv.own = max(kv.block_pages, kv.own - taken) // kv.block_pages * kv.block_pages
        yield BETWEEN
        if world.owners.get(pool.name) is pool:
            _claim(pool, kv)
