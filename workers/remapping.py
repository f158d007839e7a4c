"""KV blocks that come to a device, and go, while its engine makes steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from .background import Throttle
from .device_kv import DeviceKV
from .engine.engine import Engine
from .kv.ledger import BlockRecord

_BATCH = 32  # blocks that are mapped between two rests
_PART = 0.25  # of a step may be taken at a boundary to unmap some
_SHORTEST_S, _LONGEST_S = 1e-3, 0.1  # a model that has just been idle seems slow
_FEWEST, _MOST = 16, 4096  # blocks at a boundary
_BLOCK_S = 15e-6  # to unmap one, at first

Block = tuple[tuple[int, ...], BlockRecord | None]
"""A block by its pages, and what the ledger says of it."""


def take_in(engine: Engine, kv: DeviceKV, blocks: Sequence[Block]) -> None:
    """Map blocks, those that are mapped already apart, and have the engine know what they hold."""
    mapped = kv.map([page for pages, _ in blocks for page in pages])
    records = {pages[0]: record for pages, record in blocks}
    engine.take_in([(block, records[kv.page_of(block)]) for block in mapped])


def take_in_beside(engine: Engine, kv: DeviceKV, blocks: Sequence[Block], rest: Callable[[], None]) -> None:
    """`take_in` beside the engine's steps, which do not wait for it, with a rest now and then."""
    for at in range(0, len(blocks), _BATCH):
        take_in(engine, kv, blocks[at : at + _BATCH])
        rest()


def resize(engine: Engine, kv: DeviceKV, blocks: int, fresh: Sequence[int]) -> None:
    """Map pages as empty blocks, then part with blocks, used ones last, until ``blocks`` are mapped."""
    take_in_beside(engine, kv, [(pages, None) for pages in kv.grouped(fresh)], Throttle(engine.step_s))
    part_with(engine, kv, blocks, lambda target: engine.resize((), target))


def part_with(engine: Engine, kv: DeviceKV, blocks: int, part: Callable[[int], Sequence[int]]) -> None:
    """Unmap blocks until ``blocks`` are mapped, or the engine parts with no more.

    Between steps, at which its peers wait too: so many at a time as a quarter of a step is long, by how long those
    before have taken.

    Parameters
    ----------
    engine : Engine
    kv : DeviceKV
    blocks : int
    part : callable
        Has the engine part with blocks until so many are left, and says which. Called at least once.
    """
    size = min(max(_FEWEST, int(_at_once_s(engine) / _BLOCK_S)), _MOST)
    while True:
        before = kv.mapped
        took_s = engine.call(partial(_unmap, kv, part, max(blocks, before - size)))
        if kv.mapped <= blocks or kv.mapped == before:
            return
        size = min(max(_FEWEST, int(size * _at_once_s(engine) / took_s)), _MOST, 4 * size)


def _at_once_s(engine: Engine) -> float:
    return min(max(_SHORTEST_S, engine.step_s * _PART), _LONGEST_S)


def _unmap(kv: DeviceKV, part: Callable[[int], Sequence[int]], target: int) -> float:
    """Returns how long it took, in seconds."""
    began_s = time.perf_counter()
    kv.unmap(part(target))
    return time.perf_counter() - began_s
