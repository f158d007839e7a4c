"""The worker of one device: takes roles in generations, runs the engine, answers the ingress. Knows no Ray.

It begins as an idle standby. The first commit gives it a device's KV, an engine and clients; it keeps them from
generation to generation, and through the loss of peers, until it has retired and is released: then it is idle again.
"""

from __future__ import annotations

import itertools
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

import torch

from ..errors import InternalError
from .adoption import Inheritance, adopt, beginning
from .background import Throttle, in_background
from .device_kv import DeviceKV
from .generation import Assignment, KVSource
from .mapping import Part, fetch_pools, join
from .pages.memfd import MemfdPool
from .pages.sharing import PoolServer
from .remapping import resize
from .roles import WorkerConfig, WorkerReport
from .service import Failed, Parked, Retired, Running, Service


class Worker:
    """One worker. Methods may be called from any thread, twice, or late; generations' ids only grow.

    `prepare` may take long; nothing else waits for it.

    Parameters
    ----------
    config : WorkerConfig
    """

    def __init__(self, config: WorkerConfig) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        # Taken in this order; the last is the only one that is never held while waiting for anything else.
        self._control = threading.Lock()  # one commit, abandonment, release or stop at a time
        self._adopting = threading.Lock()
        self._mapping = threading.Lock()  # guards _kv
        self._changed = threading.Condition()  # guards everything else, and tells of its changes
        self._kv: DeviceKV | None = None
        self._parts: dict[int, Part] = {}
        self._joining: dict[int, tuple[Assignment, Mapping[str, MemfdPool]]] = {}
        self._abandoned: set[int] = set()
        self._service: Service | None = None
        self._copy_until_s: dict[tuple[str, int], float] = {}  # KV of others, as `beginning` tells them apart
        self._lent: dict[str, PoolServer] = {}
        self._stopped = False
        self._serials = itertools.count(1)

    def prepare(self, assignment: Assignment) -> None:
        """Map a generation's pages and join its exchange; returns when all members have joined.

        Raises
        ------
        ConcertinaError
            It cannot be done, or was abandoned meanwhile; whatever runs here goes on.
        """
        generation = assignment.generation.id
        with self._changed:
            self._changed.wait_for(lambda: generation not in self._joining)  # another call for the same
            if generation in self._parts or self._passed(generation):
                return
            self._refuse(generation)
            self._joining[generation] = assignment, {}
        part: Part | None = None
        try:
            part = self._join(assignment)
        finally:
            kept = self._joined(generation, part)
            if not kept:
                if part is not None:
                    part.close()
                part = None
                self._let_go_if_idle()
        if not kept:
            raise InternalError(f"worker {self.config.name}: generation {generation} was abandoned while it joined")

    def abandon(self, generation: int) -> None:
        """Let go of a generation that will not come, prepared or on offer; one that has come stays."""
        with self._control:
            service = self._service
            if service is not None and not service.withdraw(generation):
                return
            with self._changed:
                self._abandoned.add(generation)
                part = self._parts.pop(generation, None)
                self._changed.notify_all()
        if part is not None:
            part.close()
            del part
        self._let_go_if_idle()

    def commit(self, generation: int, heir: str = "") -> None:
        """Go to a prepared generation at the next boundary at which all members do, or at once while parked.

        Without an engine this starts one. A generation that was not prepared here is one that this worker has no part
        in: it retires, with its sequences, at that boundary, or at once while parked. Does not wait for the boundary.

        Parameters
        ----------
        generation : int
        heir : str
            The device whose worker takes a leaver's running sequences over at that boundary (`Assignment.inherits`):
            their clients are told then to go on there. Empty: all wait for `release`.

        Raises
        ------
        InternalError
            It was abandoned; the engine has failed; or an idle worker has not prepared it.
        """
        with self._control:
            if generation in self._abandoned:
                raise InternalError(f"worker {self.config.name}: generation {generation} was abandoned")
            if self._service is not None:
                self._service.commit(generation, heir)
                return
            with self._changed:
                part = self._parts.get(generation)
            if part is None:
                raise InternalError(f"worker {self.config.name}: generation {generation} was not prepared")
            service = Service(self.config, part, self._parts, self._changed)
            with self._changed:
                self._service = service
                del self._parts[generation]
                self._changed.notify_all()

    def wait_for_boundary(self, generation: int, timeout_s: float) -> None:
        """Return when a generation that was committed has come, will not come, or after ``timeout_s``."""
        service = self._service
        if service is not None:
            with self._changed:
                self._changed.wait_for(lambda: not service.offers(generation), timeout_s)

    def park(self, generation: int, timeout_s: float) -> None:
        """Stop with all sequences in a generation that has lost a member, as if its exchange had told.

        Returns once that has happened, or after ``timeout_s``: it does as soon as the engine looks around. Nothing
        happens if another generation runs.
        """
        service = self._service
        if service is not None:
            service.give_up(generation)
            with self._changed:
                self._changed.wait_for(lambda: not service.runs(generation), timeout_s)

    def kv_pages(self) -> tuple[int, ...]:
        """Pages of the KV blocks mapped now, block by block."""
        kv = self._kv
        return () if kv is None else kv.pages

    def resize_kv(self, blocks: int, fresh: Sequence[int]) -> tuple[int, ...]:
        """Map more pages as empty blocks, then give up blocks until ``blocks`` are mapped.

        Free blocks go first, then cached ones, then those of the latest arrivals, which wait again.

        Parameters
        ----------
        blocks : int
        fresh : sequence of int
            Whole blocks, of the device's KV extent; those that are mapped already are skipped.

        Returns
        -------
        tuple of int
            All pages mapped afterwards, block by block.

        Raises
        ------
        InternalError
            There is no engine.
        """
        service, kv = self._serving()
        service.check()
        with self._adopting:  # its controller may have been followed by one that knows nothing of that
            resize(service.engine, kv, blocks, fresh)
        return kv.pages

    def adopt_kv(self, source: KVSource, blocks: int, limit_s: float | None = None) -> tuple[int, ...]:
        """Take over the KV of a device whose worker has left, then give up blocks down to ``blocks``.

        Blocks in use stay, even if that makes more. What has to be copied is left where it is after ``limit_s``, and
        when the engine stops: nobody waits for it then, and who recovers from that waits for this.

        Returns
        -------
        tuple of int
            All pages mapped afterwards, block by block.

        Raises
        ------
        ConcertinaError
            There is no engine, or the source cannot be read.
        """
        service, kv = self._serving()
        service.check()

        def go_on() -> bool:
            return isinstance(service.state, Running) and self._may_copy(source)

        def hurried() -> bool:
            return self._copy_until_s[beginning(source)] < inf

        self.limit_kv(source, limit_s)
        with self._adopting:
            adopt(service.engine, kv, source, blocks, go_on, hurried)
        return kv.pages

    def limit_kv(self, source: KVSource, limit_s: float | None) -> None:
        """Have `adopt_kv` and `prepare`, if they copy from that source, do so for ``limit_s`` from now on."""
        self._copy_until_s[beginning(source)] = inf if limit_s is None else time.monotonic() + limit_s

    def _may_copy(self, source: KVSource) -> bool:
        return time.monotonic() < self._copy_until_s[beginning(source)]

    def release(self, moved_to: str) -> None:
        """Tell a retired worker's clients to go on at the device ``moved_to`` (empty: any), and be idle again.

        Raises
        ------
        InternalError
            The worker has not retired.
        """
        with self._control:
            service = self._service
            if service is None:
                return
            service.release(moved_to)
            with self._changed:
                self._service = None
                parts = list(self._parts.values())  # their KV is that of the device, which is another's now
                self._parts.clear()
                lent, self._lent = self._lent, {}  # an owner that took one over holds it by itself
                self._changed.notify_all()
            for part in parts:
                part.close()
            for server in lent.values():
                server.close()
            del service
            self._let_go_if_idle()

    def lend(self, pool: str) -> str | None:
        """Serve a pool that is mapped here, for an owner that is to take it over; returns the address.

        None if nothing of a pool of that name is mapped here. That is no error: a traceback would keep what is.
        """
        with self._changed:
            found = self._find_pool(pool)
            if found is None:
                return None
            lent = self._lent.get(pool)
            if lent is None or not os.path.sameopenfile(lent.pool.fd, found[0].fd):  # another one of that name
                if lent is not None:
                    lent.close()
                self._lent[pool] = lent = PoolServer(*found, f"@concertina/lent/{secrets.token_hex(8)}")
            return lent.address

    def report(self) -> WorkerReport:
        """State and counters now."""
        with self._changed:
            report, service = replace(self._report(), serial=next(self._serials)), self._service
        kv = self._kv
        if kv is not None:
            report = replace(report, device=kv.device, kv_blocks=kv.mapped, kv_copied_bytes=kv.copied_bytes)
        if service is None:
            return report
        engine, address = service.engine, (self.config.host, service.frontend.port)
        part = service.part  # once: with the counts of another generation than ``counted`` they would not add up
        counts = tuple(map(tuple, part.experts.counts_LE.tolist()))
        report = replace(report, counts_LE=counts, counted=part.generation)
        return replace(report, load=engine.load, stats=engine.stats, address=address)

    def step_ends_s(self, since_s: float) -> list[float]:
        """When the engine's steps since a moment of the node's monotonic clock ended; a bounded number of them."""
        service = self._service
        return [] if service is None else [end_s for end_s in service.engine.step_ends_s.copy() if end_s > since_s]

    def watch(self, seen: WorkerReport, timeout_s: float) -> WorkerReport:
        """A report as soon as its `WorkerReport.situation` is not that of ``seen``, or after ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._report().situation != seen.situation, timeout_s)
        return self.report()

    def stop(self) -> None:
        """End the engine and close what is open; the worker takes no role any more."""
        with self._changed:
            self._stopped = True
            service = self._service
            lent, self._lent = self._lent, {}
        if service is not None:  # without waiting for a commit, which may be waiting for peers
            service.stop()
        with self._changed:
            self._service = None
            parts = list(self._parts.values())
            self._parts.clear()
            self._changed.notify_all()
        for part in parts:
            part.close()
        for server in lent.values():
            server.close()
        self._let_go_if_idle()

    def _report(self) -> WorkerReport:
        """What `WorkerReport.situation` says; the caller holds ``_changed``."""
        service, prepared = self._service, frozenset(self._parts)
        joining, abandoned = frozenset(self._joining.keys() - self._abandoned), max(self._abandoned, default=0)
        report = WorkerReport(self.config.name, os.getpid(), prepared, 0, "", joining=joining, abandoned=abandoned)
        if service is None:
            return report
        report = replace(report, serving=service.generation)
        match service.state:
            case Parked(reason):
                return replace(report, parked=reason)
            case Retired(generation):
                return replace(report, retired=generation)
            case Failed(reason):
                return replace(report, failed=reason)
        return replace(report, failed=service.stuck)

    def _join(self, assignment: Assignment) -> Part:
        """In the background if nothing runs here, so that those who serve on the same cores do not feel it."""
        service, kv = self._service, self._kv

        def abandoned() -> bool:
            return assignment.generation.id in self._abandoned

        for source in assignment.inherits:
            self.limit_kv(source, source.limit_s)
        pools = fetch_pools(assignment)
        with self._changed:  # before a page is mapped: who maps something of a pool must be able to lend it
            self._joining[assignment.generation.id] = assignment, pools
        if service is None or kv is None:
            return in_background(lambda: join(assignment, pools, self._kv_for, abandoned))
        inheritance = Inheritance(kv, assignment.inherits, lambda source: not abandoned() and self._may_copy(source))
        with inheritance.copying_ahead(service.engine):
            part = join(assignment, pools, self._kv_for, abandoned, Throttle(service.engine.step_s), cold=False)
            return replace(part, inheritance=inheritance)

    def _passed(self, generation: int) -> bool:
        """Whether this worker has come to that generation, or beyond."""
        return self._service is not None and generation <= self._service.part.generation

    def _refuse(self, generation: int) -> None:
        """Raise unless this worker may take part in a new generation."""
        if self._stopped:
            raise InternalError(f"worker {self.config.name}: it has been stopped")
        if generation in self._abandoned:
            raise InternalError(f"worker {self.config.name}: generation {generation} was abandoned")
        match self._service.state if self._service is not None else None:
            case Failed(reason):
                raise InternalError(f"worker {self.config.name}: {reason}")
            case Retired():
                raise InternalError(f"worker {self.config.name}: it has retired and waits to be released")

    def _joined(self, generation: int, part: Part | None) -> bool:
        """Note the end of joining; whether the part is wanted still."""
        with self._changed:
            self._joining.pop(generation, None)
            kept = part is not None and generation not in self._abandoned and not self._stopped
            if part is not None and kept:
                self._parts[generation] = part
            self._changed.notify_all()
        return kept

    def _kv_for(self, assignment: Assignment, pool: MemfdPool) -> DeviceKV:
        with self._mapping:
            if self._kv is None:
                self._kv = DeviceKV(assignment, pool)
            self._kv.check(assignment, pool)
            return self._kv

    def _let_go_if_idle(self) -> None:
        """A device's KV is kept only as long as there is a role for it."""
        with self._mapping:
            with self._changed:
                idle = self._service is None and not self._parts and not self._joining
                lent = list(self._lent.values()) if idle else []
                if idle:
                    self._lent.clear()
            for server in lent:  # it would keep a pool that its owner has ended
                server.close()
            if idle and self._kv is not None:
                self._kv.close()
                self._kv = None

    def _serving(self) -> tuple[Service, DeviceKV]:
        service, kv = self._service, self._kv
        if service is None or kv is None:
            raise InternalError(f"worker {self.config.name} serves no generation")
        return service, kv

    def _find_pool(self, name: str) -> tuple[MemfdPool, str] | None:
        """A pool that is mapped here, and its token."""
        parts = list(self._parts.values()) + ([self._service.part] if self._service is not None else [])
        mapped = [(part.assignment, part.pools) for part in parts] + list(self._joining.values())
        for assignment, pools in mapped:
            for extents in (assignment.node, assignment.device):
                if extents.name == name and name in pools:
                    return pools[name], extents.token
        return None
