"""Real owners with a tiny model in them, and assignments for whoever shall run it."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from concertina.planners.placement import Placement, Replica
from concertina.workers.engine.scheduler import SchedulerConfig
from concertina.workers.exchange.layout import region_bytes
from concertina.workers.generation import (
    TRUNK_KEY,
    Assignment,
    ExchangeSpec,
    Generation,
    KVSource,
    PoolExtents,
    expert_key,
    kv_key,
)
from concertina.workers.kv.ledger import record_bytes
from concertina.workers.model_files import ModelFiles
from concertina.workers.owner import MemoryOwner
from concertina.workers.owner_roles import OwnerConfig
from concertina.workers.pages.sizing import pages_for
from concertina.workers.pages.table import ExtentRequest
from concertina.workers.roles import WorkerConfig
from concertina.workers.worker import Worker

TOKEN = "a secret"
PAGE = 4096
BLOCK_TOKENS = 4
CAPACITY = 4096
_numbers = itertools.count(1)


def worker_config(**fields: Any) -> WorkerConfig:
    scheduler = SchedulerConfig(160, max_batched_tokens=24, max_running=8)
    name = f"w{next(_numbers)}"
    return WorkerConfig(name, "127.0.0.1", TOKEN, threads=1, scheduler=scheduler, **fields)


class AnyWorker(Protocol):
    """A `Worker` here, or one in another process."""

    def call(self, name: str, *args: Any) -> Any: ...


@dataclass
class LocalWorker:
    """A worker in this process."""

    worker: Worker = field(default_factory=lambda: Worker(worker_config()))

    def call(self, name: str, *args: Any) -> Any:
        return getattr(self.worker, name)(*args)


class Site:
    """Pools of one node: one for all devices, or one for each and one for what they share.

    Parameters
    ----------
    files : ModelFiles
    devices : sequence of str
        All that will ever take part.
    blocks : int
        KV blocks of each device at first.
    separate : bool
    """

    def __init__(self, files: ModelFiles, devices: Sequence[str], blocks: int = 40, *, separate: bool = False) -> None:
        self.files, self.devices, self.separate = files, tuple(devices), separate
        self.block_pages = pages_for(files.kv_block_bytes(BLOCK_TOKENS), PAGE)
        self._generations = itertools.count(1)
        self._name = f"site-{os.getpid()}-{next(_numbers)}"
        self.node = self._owner("node")
        self.owners = {d: self._owner(d) if separate else self.node for d in devices}
        self._fill(blocks)

    def close(self) -> None:
        for owner in {id(o): o for o in (self.node, *self.owners.values())}.values():
            owner.close()

    def generation(
        self,
        devices: Sequence[str],
        kind: str = "shared",
        store: int = 0,
        timeout_s: float = 20.0,
        shift: int = 0,
        threads: int = 0,
    ) -> list[Assignment]:
        """The next generation: expert e is on device ``(e + shift) % n``; one assignment per rank.

        ``store`` is the port of the store at which members over gloo meet.
        """
        number, model, size = next(self._generations), self.files.config, len(devices)
        layer = tuple((Replica((e + shift) % size, e // size),) for e in range(model.experts))
        placement = Placement(tuple(devices), (layer,) * len(model.moe_layers))
        if kind == "shared":
            self.node.allocate(f"exchange/{number}", "exchange", pages_for(region_bytes(size, CAPACITY), PAGE))
        chosen = "solo" if size == 1 else kind
        spec = ExchangeSpec(chosen, timeout_s, CAPACITY, "127.0.0.1", store)  # type: ignore[arg-type]
        generation = Generation(number, model, self.files.dtype, placement, spec, PAGE, BLOCK_TOKENS)
        return [
            Assignment(generation, rank, self.extents(device), self.extents(None), threads)
            for rank, device in enumerate(devices)
        ]

    def extents(self, device: str | None) -> PoolExtents:
        """A device's pool, or the node's, as it is now."""
        owner = self.node if device is None else self.owners[device]
        name = "node" if owner is self.node else f"device/{device}"
        return PoolExtents(name, owner.address, TOKEN, {extent.key: extent.pages for extent in owner.extents()})

    def kv(self, device: str) -> tuple[int, ...]:
        """The device's KV extent."""
        return self.owners[device].extent(kv_key(device)).pages

    def source(self, device: str, *, far: bool = False) -> KVSource:
        """The device's KV; ``far``: as seen from another node."""
        source = self.owners[device].source()
        return KVSource(self.extents(device), replace(source, address="") if far else source, self.kv(device))

    def _owner(self, what: str) -> MemoryOwner:
        name = f"{self._name}/{what}"
        return MemoryOwner(OwnerConfig(name, 4096, PAGE, TOKEN, ledger_record_bytes=record_bytes(BLOCK_TOKENS)))

    def _fill(self, blocks: int) -> None:
        files = self.files
        experts = [expert_key(m, e) for m in range(len(files.config.moe_layers)) for e in range(files.config.experts)]
        weights = [ExtentRequest(key, "experts", pages_for(files.expert_bytes, PAGE)) for key in experts]
        trunk = ExtentRequest(TRUNK_KEY, "trunk", pages_for(files.trunk_bytes, PAGE))
        pools: dict[int, tuple[MemoryOwner, list[ExtentRequest]]] = {id(self.node): (self.node, [trunk])}
        for owner in self.owners.values():
            pools.setdefault(id(owner), (owner, []))
        for owner, requests in pools.values():
            if owner is not self.node or not self.separate:
                requests.extend(weights)
            owner.allocate_all(requests)
            owner.load(list(files.pieces(r.key for r in requests)))
        for device, owner in self.owners.items():
            owner.allocate(kv_key(device), "kv", blocks * self.block_pages)


def together(*calls: Callable[[], Any]) -> None:
    """Run all at once, as members of a generation join; the first error is raised."""
    errors: list[BaseException] = []

    def run(call: Callable[[], Any]) -> None:
        try:
            call()
        except BaseException as e:  # noqa: BLE001 - raised below, in the test's thread
            errors.append(e)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def prepare(workers: Sequence[AnyWorker], assignments: Sequence[Assignment]) -> int:
    """Have everybody prepare; the generation's id."""
    together(*(lambda w=w, a=a: w.call("prepare", a) for w, a in zip(workers, assignments, strict=True)))  # type: ignore[misc]
    return assignments[0].generation.id


def bring(workers: Sequence[AnyWorker], assignments: Sequence[Assignment], *leavers: AnyWorker, heir: str = "") -> int:
    """Prepare and commit a generation, and wait until it has come."""
    number = prepare(workers, assignments)
    for worker in workers:
        worker.call("commit", number)
    for worker in leavers:
        worker.call("commit", number, heir)
    for worker in workers:
        until(worker, lambda report: report.serving == number and not report.parked)
    for worker in leavers:
        until(worker, lambda report: report.retired == number)
    return number


def until(worker: AnyWorker, holds: Callable[[Any], bool], timeout_s: float = 20.0) -> Any:
    """Watch a worker until something holds; its report."""
    report = worker.call("report")
    for _ in range(int(timeout_s * 2)):
        if holds(report):
            return report
        report = worker.call("watch", report, 0.5)
    raise AssertionError(f"it never came to that: {report}")
