"""What a deployment must look like once nothing happens any more (invariant C9)."""

from __future__ import annotations

from collections.abc import Mapping

from concertina.orchestrator.core.layout import Layout
from concertina.orchestrator.core.state import Record, State
from concertina.workers.generation import LEDGER_KEY, kv_key

from .core_processes import Worker, must
from .core_world import World

Routes = Mapping[str, tuple[Layout, ...]]


def check_rest(state: State, world: World, routes: Routes) -> None:
    """One generation serves, as asked for by operations with these routes, and nothing else is there."""
    serving = state.serving
    must(serving is not None and state.pending is None and state.operation is None, "C9: not at rest")
    assert serving is not None
    must(world.steps(serving.id), f"C9: generation {serving.id} makes no steps: {world.workers}")
    _check_layout(state, serving.layout, world, routes)
    _check_pools(state, serving, world)
    _check_kv(serving, world)
    _check_workers(state, serving, world)


def _check_layout(state: State, layout: Layout, world: World, routes: Routes) -> None:
    """It is the goal of the last operation that succeeded, or on the way of a later one; without lost devices."""
    must(set(layout.nodes) <= world.nodes_alive, "C9: a device is on a node that is gone")
    done = max((i for i, o in enumerate(state.operations) if o.outcome == "done"), default=-1)
    must(done >= 0, "C9: nothing was ever done")
    must(not any(o.route for o in state.operations), "C9: an operation that has ended keeps its layouts")
    later = (each for o in state.operations[done + 1 :] if o.outcome != "canceled" for each in routes[o.id])
    allowed = [routes[state.operations[done].id][-1], *later]
    if layout in allowed:
        return
    survivors = [[s for s in other.seats if s.node == "a"] for other in allowed]
    must(list(layout.seats) in survivors, f"C9: {layout.devices} was not asked for: {state.operations[done:]}")


def _check_pools(state: State, serving: Record, world: World) -> None:
    layout = serving.layout
    wanted = layout.extents(serving.id)
    free = [f"cpu-{k}" for k in range(len(layout.seats) + state.standbys) if f"cpu-{k}" not in layout.devices]
    kept = free[: state.standbys] if layout.memory_mode == "separate" else []
    expected_pools = {*wanted, *(f"device/{node}/{device}" for node in layout.nodes for device in kept)}
    must(set(world.owners) == expected_pools, f"C9: pools {sorted(world.owners)}; expected {sorted(expected_pools)}")
    for name, pool in world.owners.items():
        there = set(pool.extents) - {LEDGER_KEY}
        expected = {r.key for r in wanted.get(name, ())}
        must(there == expected, f"C9: {name} has {there - expected} too many and lacks {expected - there}")
        must(not pool.loading, f"C9: {name} still loads {pool.loading}")


def _check_kv(serving: Record, world: World) -> None:
    layout = serving.layout
    for rank, (device, name) in enumerate(zip(layout.devices, serving.workers, strict=True)):
        kv, blocks = world.workers[name].kv, layout.kv_blocks(rank)
        assert kv is not None
        must(kv.device == device and kv.blocks == blocks, f"C9: {name} has {kv}; expected {blocks} blocks of {device}")
        pages = world.owners[layout.device_pool(rank)].extents[kv_key(device)]
        must(pages == blocks * layout.memory.kv_block_pages, f"C9: extent {kv_key(device)} has {pages} pages")


def _check_workers(state: State, serving: Record, world: World) -> None:
    others: list[Worker] = [w for w in world.workers.values() if w.name not in serving.workers]
    busy = [w for w in others if not w.fact().idle or w.kv is not None]
    must(not busy, f"C9: {busy} should have no role")
    for node in world.nodes_alive:
        idle = sum(w.node == node for w in others)
        want = state.standbys if node in serving.layout.nodes else 0
        must(idle == want, f"C9: {idle} standbys on {node}; expected {want}")
