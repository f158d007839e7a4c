"""Calls to processes that may be gone or hang.

A deed is a generator. It yields ``CALLED`` while a call to another process is under way, which ends even if the
controller does not live to hear of it, and ``BETWEEN`` between two calls. It raises `Trouble`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Literal

from .core_processes import KV, Pool, Trouble, Worker

if TYPE_CHECKING:
    from .core_world import World

Moment = Literal["called", "between"]
CALLED: Moment = "called"
BETWEEN: Moment = "between"
Deed = Iterator[Moment]


def owner(world: World, name: str) -> Pool:
    if name not in world.owners:
        raise Trouble(f"memory owner {name}: its process ended")
    return world.owners[name]


def answering_owner(world: World, name: str) -> Generator[Moment, None, Pool]:
    """The pool, once its owner answers."""
    while owner(world, name).hung_since_s is not None:
        yield CALLED
    return owner(world, name)


def answering(world: World, name: str) -> Generator[Moment, None, Worker]:
    """The worker, once it answers."""
    while name in world.workers and world.workers[name].hung_since_s is not None:
        yield CALLED
    if name not in world.workers:
        raise Trouble(f"{name}: its process ended")
    return world.workers[name]


def kv_of(worker: Worker) -> KV:
    if worker.part is None or worker.kv is None or worker.failed:
        raise Trouble(f"{worker.name} serves no generation")
    return worker.kv
