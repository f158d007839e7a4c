"""What effects do to a simulated cluster, in the pieces in which `orchestrator.deeds` does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from concertina.orchestrator.core.facts import (
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
from concertina.orchestrator.core.layout import node_pool
from concertina.workers.generation import kv_key

from .core_calls import BETWEEN, CALLED, Deed, answering, answering_owner, owner
from .core_kv import hand_over, resize_kv
from .core_processes import KV, Part, Pool, Trouble, Worker, must

if TYPE_CHECKING:
    from .core_world import World

JOIN_S = 10.0
START_S = 15.0


def deed(world: World, effect: Effect) -> Deed:
    """Carry an effect out, piece by piece; raises `Trouble`."""
    match effect:
        case StartOwner():
            return _startowner(world, effect)
        case StopOwner():
            return _stop_owner(world, effect)
        case StartWorker():
            return _start_worker(world, effect)
        case Fill():
            return _fill(world, effect)
        case OpenStore():
            return _open_store(world)
        case ResizeKV():
            return resize_kv(world, effect)
        case Prepare():
            return _prepare(world, effect)
        case Commit():
            return _commit(world, effect)
        case Abandon():
            return _abandon(world, effect)
        case Park():
            return _park(world, effect)
        case HandOver():
            return hand_over(world, effect)
        case StopWorker():
            return _stop_worker(world, effect)
        case Free():
            return _free(world, effect)


def _startowner(world: World, effect: StartOwner) -> Deed:
    yield CALLED
    yield from _until_it_answers(world, effect.pool)
    yield from _until_node_speaks(world, effect.node)
    while any(w.hung_since_s is not None and w.maps_any(p) for w, p in world.mappings(effect.pool)):
        yield CALLED  # it is asked to lend the pool, and does not answer
    if effect.pool in world.owners:
        return
    left = {id(pool): pool for _, pool in world.mappings(effect.pool)}
    must(len(left) < 2, f"C12: pool {effect.pool} exists twice")
    pool = next(iter(left.values()), None)
    if pool is None:
        pool = Pool(effect.pool, effect.node, effect.pages, world.budget(effect.pool, effect.pages))
        world.lost_pools.discard(effect.pool)
    must(pool.pages == effect.pages, f"C12: {effect.pool} of {pool.pages} pages cannot be adopted as {effect.pages}")
    pool.loading.clear()
    world.owners[effect.pool] = pool


def _stop_owner(world: World, effect: StopOwner) -> Deed:
    yield CALLED
    pool = world.owners.get(effect.pool)
    if pool is not None:
        needed = world.needed(pool.name) & pool.extents.keys() if pool.hung_since_s is None else set()
        must(not needed, f"C11: {pool.name} was stopped, which holds {needed}")
        world.end_owner(pool.name)


def _start_worker(world: World, effect: StartWorker) -> Deed:
    yield CALLED
    yield from _until_it_answers(world, effect.worker)
    yield from _until_node_speaks(world, effect.node)
    if effect.worker not in world.workers:
        world.workers[effect.worker] = Worker(effect.worker, effect.node)


def _until_it_answers(world: World, name: str) -> Deed:
    """A process that hangs while it starts is killed after a while."""
    since_s = world.now_s
    while name in world.stuck:
        yield CALLED
        if world.now_s - since_s > START_S:
            world.stuck.discard(name)
            raise Trouble(f"{name} gave no answer")


def _until_node_speaks(world: World, node: str) -> Deed:
    """A node that is gone gives no answer until the cluster has noticed."""
    while node not in world.nodes_alive:
        if node not in world.nodes_known:
            raise Trouble(f"node {node} is gone")
        yield CALLED


def _fill(world: World, effect: Fill) -> Deed:
    yield CALLED
    pool = yield from answering_owner(world, effect.pool)
    while any(r.key in pool.loading for r in effect.requests):
        yield CALLED  # somebody else is filling them
        same(world, pool)
    keys = pool.load(effect.requests)
    try:
        yield CALLED
        yield from answering_owner(world, effect.pool)
        same(world, pool)
        pool.finish(keys)
    finally:  # what was not filled is given back, whatever ends this
        for key in keys:
            pool.loading.pop(key, None)


def same(world: World, pool: Pool) -> None:
    if world.owners.get(pool.name) is not pool:
        raise Trouble(f"memory owner {pool.name}: its process ended")


def _open_store(world: World) -> Deed:
    yield CALLED
    world.store = ("127.0.0.1", 1)


def _prepare(world: World, effect: Prepare) -> Deed:
    generation = effect.generation
    yield CALLED
    worker = yield from answering(world, effect.worker)
    while generation in worker.joining:
        yield CALLED  # another call for the same
    if generation in worker.prepared or (worker.part is not None and generation <= worker.part.generation):
        return
    if generation in worker.abandoned or worker.retired or worker.failed:
        raise Trouble(f"{worker.name}: {worker.failed or 'abandoned or retired'}")
    layout, rank = world.records[generation].layout, world.records[generation].rank_of(worker.name)
    for pool in sorted({layout.device_pool(rank), node_pool(layout.seats[rank].node)}):
        yield from answering_owner(world, pool)
    worker.joining[generation] = _map(world, worker, generation)
    try:
        yield from _meet(world, worker, generation)
        part = worker.joining[generation]
        if generation in worker.abandoned:
            raise Trouble("abandoned while it joined")
        worker.prepared[generation] = part
        world.ever_prepared.setdefault(generation, set()).add(worker.name)
    finally:
        del worker.joining[generation]
        worker.let_go_if_idle()


def _meet(world: World, worker: Worker, generation: int) -> Deed:
    """Until all members have joined."""
    members = world.records[generation].workers
    patience_s = world.now_s + JOIN_S
    while not all(world.with_it(name, generation) for name in members):
        yield CALLED
        if generation in worker.abandoned:
            raise Trouble("abandoned while it joined")
        if world.now_s > patience_s:
            raise Trouble("a peer did not join")


def _map(world: World, worker: Worker, generation: int) -> Part:
    record = world.records[generation]
    layout, rank = record.layout, record.rank_of(worker.name)
    device, name = layout.device_pool(rank), layout.devices[rank]
    wanted = {p: {r.key for r in rs} for p, rs in layout.extents(generation).items()}
    keys: dict[Pool, frozenset[str]] = {}
    for pool_name in sorted({device, node_pool(layout.seats[rank].node)}):
        pool = owner(world, pool_name)
        keys[pool] = frozenset(key for key in wanted[pool_name] if not key.startswith("kv/"))
        if not wanted[pool_name] <= set(pool.extents):
            raise Trouble(f"pool {pool_name}: extents are missing")
    if worker.kv is None:
        pool = world.owners[device]
        worker.kv = KV(pool, name, layout.memory.kv_block_pages, pool.extents[kv_key(name)])
    if worker.kv.device != name:
        raise Trouble(f"{worker.name} has the KV of {worker.kv.device}")
    must(worker.kv.pool is world.owners[device], f"C12: {worker.name} has its KV in another pool {device}")
    return Part(generation, keys)


def _commit(world: World, effect: Commit) -> Deed:
    generation = effect.generation
    yield CALLED
    worker = yield from answering(world, effect.worker)
    if generation in worker.abandoned or worker.failed:
        raise Trouble(f"{worker.name}: abandoned or failed")
    if worker.part is None and generation not in worker.prepared:
        raise Trouble(f"{worker.name}: generation {generation} was not prepared")
    if worker.part is not None and (generation <= worker.part.generation or generation == worker.retired):
        return
    if worker.runs:
        worker.offered = max(worker.offered, generation)  # the newest offer replaces one that nobody will join in
    elif generation in worker.prepared:
        if worker.retired:
            raise Trouble(f"{worker.name}: the engine has retired")
        world.switch(worker, generation)
    elif worker.parked:
        worker.go(generation)


def _abandon(world: World, effect: Abandon) -> Deed:
    yield CALLED
    worker = yield from answering(world, effect.worker)
    if worker.part is not None and worker.part.generation == effect.generation:
        return
    if worker.offered == effect.generation:
        worker.offered = 0
    worker.abandoned.add(effect.generation)
    worker.prepared.pop(effect.generation, None)
    worker.let_go_if_idle()


def _park(world: World, effect: Park) -> Deed:
    yield CALLED
    worker = yield from answering(world, effect.worker)
    if worker.runs and worker.serving == effect.generation:
        worker.parked = "it was told that a peer is lost"


def _stop_worker(world: World, effect: StopWorker) -> Deed:
    yield CALLED
    world.end_worker(effect.worker, noticed=True)


def _free(world: World, effect: Free) -> Deed:
    yield BETWEEN
    yield from answering_owner(world, effect.pool)
    world.free(effect.pool, effect.keys)
