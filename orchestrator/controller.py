"""The controller's shell: looks at the cluster, asks the core what to do, and does it. Knows no Ray.

One loop: snapshot, `core.step.step`, make the state durable, start the effects it asks for. An effect that ends wakes
the loop, and so does a worker or owner that dies or says something new; a tick does too, because a wake-up may be lost.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import pickle
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from numbers import Integral, Real

from ..errors import InternalError, OperatorError, Unreachable
from ..workers.model_files import ModelFiles
from .balancer import Balancer
from .cluster import Cluster
from .config import DeploymentConfig
from .core.facts import Effect, PoolFact, WorkerFact
from .core.layout import Layout, node_of_pool
from .core.operations import cancel, end, request
from .core.state import Leaving, Operation, OperationKind, State
from .core.step import step
from .deeds import Deeds
from .hands import Hands, OwnerHandle, WorkerHandle
from .kv_deeds import KVDeeds
from .planfiles import model_spec
from .planning import plan_layout
from .preview import Preview, preview
from .registry import Registry
from .replanning import Replanner
from .report import member_list, operation_status, pool_statuses, worker_statuses
from .resize import drained, placed, rebalanced, resized, route
from .seating import nodes_called
from .status import DeploymentStatus, MemberList, OperationStatus, Progress
from .tokens import WrongToken
from .under_way import UnderWay, error_text

_log = logging.getLogger(__name__)
_TICK_S = 1.0
_STOP_S = 2.0
_LATEST = 10  # operations in a status
_EXPERTS = "experts"  # what a rebalancing is about


@dataclass(slots=True)
class Moved:
    """Bytes loaded or copied for the operation under way, and in all before it began."""

    operation: str = ""
    done: int = 0
    total: int = 0
    done_before: int = 0
    total_before: int = 0

    def note(self, operation: str, done: int, total: int, coming: int) -> None:
        """Take in the deployment's counters; a new operation begins at zero, and with what is ``coming`` already."""
        if operation != self.operation:
            self.operation, self.done_before, self.total_before = operation, done, total - coming
        self.done, self.total = done - self.done_before, total - self.total_before


class Controller:
    """One deployment, from its configuration to a serving generation and to whatever it becomes later.

    Parameters
    ----------
    config : DeploymentConfig
    hands : Hands
        What starts processes, keeps the state and tells the time.
    """

    def __init__(self, config: DeploymentConfig, hands: Hands) -> None:
        self._config = config
        self._hands = hands
        self._state = State(standbys=config.standbys, began_s=hands.now_s())
        self._reason = "reading the checkpoint"
        self._cluster = Cluster(hands, config.hang_timeout_s, self._woken)
        self._deeds: Deeds | None = None
        self._under_way = UnderWay(self._do, self._ended)
        self._balancer: Balancer | None = None
        self._replanner: Replanner | None = None
        self._members = MemberList(int(1000 * hands.now_s()))  # other versions than before a restart
        self._moved = Moved()
        self._planning: asyncio.Task[None] | None = None
        self._saving = asyncio.Lock()
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bring the first generation up, or wait for one that a restarted controller found; returns when it serves.

        Raises
        ------
        OperatorError
            The checkpoint, placement, memory or cluster does not allow it; nothing is served then.
        InternalError
            What was started has failed.
        """
        if self._loop is None:
            await self._cluster.look_at_nodes()
            model = ModelFiles.open(self._config.checkpoint, self._config.dtype)
            if self._config.engine.emulated_step_ms:
                _log.warning("step times are emulated: at least %g ms", self._config.engine.emulated_step_ms)
            nodes = list(self._cluster.nodes.values())
            layout = plan_layout(self._config, model, nodes, self._hands.now_s)
            await self._hands.keep(pickle.dumps(model))
            self._begin(model)
            await self._ask("start", f"{len(layout.seats)} workers", (layout,))
        async with self._changed:
            await self._changed.wait_for(lambda: self._state.failure or self._all_reachable())
        self.check()

    async def resume(self) -> None:
        """Go on where an earlier process of this controller was: its state is durable, its processes are there.

        So is the checkpoint's description: another one that has its path now is not what the pages hold.
        """
        saved, kept = await self._hands.load(), await self._hands.kept()
        if saved is None or kept is None:
            return
        self._state, model = pickle.loads(saved), pickle.loads(kept)
        await self._cluster.look_at_nodes()
        existing = await self._hands.existing()
        prefix = f"{self._config.name}/"
        finding = [self._find_worker(name, *found) for name, found in existing.workers.items()]
        finding += [self._find_owner(name.removeprefix(prefix), owner) for name, owner in existing.owners.items()]
        await asyncio.gather(*finding)
        if self._state.serving is not None or self._state.pending is not None:
            self._begin(model)

    async def _find_worker(self, name: str, node: str, handle: WorkerHandle) -> None:
        """Note a worker of before; one that gives no answer is ended before another takes its place."""
        try:
            await asyncio.wait_for(self._cluster.add_worker(name, node, handle), self._config.hang_timeout_s)
        except (Unreachable, TimeoutError) as e:
            self._cluster.add_lost(name, node, handle, str(e) or "it gives no answer to a new controller")
        except InternalError as e:
            _log.warning("%s", e)

    async def _find_owner(self, pool: str, handle: OwnerHandle) -> None:
        """Note an owner of before; one that gives no answer has its name, so that no other one comes beside it."""
        try:
            adding = self._cluster.add_pool(pool, node_of_pool(pool), handle)
            await asyncio.wait_for(adding, self._config.hang_timeout_s)
        except (InternalError, TimeoutError) as e:
            _log.warning("memory owner %s is not taken up again: %s", pool, e or "it gives no answer")
            with suppress(InternalError):  # tried again when its successor is started
                await self._hands.kill(f"{self._config.name}/{pool}")

    def check(self) -> None:
        """Raise `InternalError` if the deployment has failed."""
        if self._state.failure:
            raise InternalError(self._state.failure)

    async def progress(self) -> Progress:
        """How far starting up is."""
        await self._cluster.ask()
        return Progress(self._reason, self._cluster.moved_bytes, self._deeds.wanted_bytes if self._deeds else 0)

    async def stop(self) -> None:
        """End the loop, all workers and all owners, and forget the state."""
        if self._loop is not None:
            self._loop.cancel()
        if self._planning is not None:
            self._planning.cancel()
        self._under_way.cancel()
        self._cluster.close()
        names = [*self._cluster.workers, *(pool.config.name for pool in self._cluster.pools.values())]
        stops = (asyncio.wait_for(m.handle.stop(), _STOP_S) for m in self._cluster.workers.values())
        await asyncio.gather(*stops, return_exceptions=True)  # who does not stop is killed
        await asyncio.gather(*(self._hands.kill(name) for name in names), return_exceptions=True)
        await self._hands.forget()

    async def members(self, seen: int = -1, timeout_s: float = 10.0) -> MemberList:
        """Workers that take requests, as soon as that is another list than number ``seen``, or after the time-out."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._members.version != seen)
        return self._members

    async def status(self) -> DeploymentStatus:
        """One picture of everything, as it is now."""
        await self._cluster.ask()
        record, config = self._state.serving, self._config
        model = self._deeds.model if self._deeds else None
        phase = "failed" if self._state.failure else self._phase()
        return DeploymentStatus(
            name=config.name,
            model=config.endpoint.model_name or os.path.basename(config.checkpoint),
            endpoint=config.endpoint.url,
            generation=record.id if record else 0,
            phase=phase,
            exchange=record.layout.exchange if record else "",
            dtype=model.dtype if model else config.dtype,
            layers=len(model.config.moe_layers) if model else 0,
            experts=model.config.experts if model else 0,
            uptime_s=self._hands.now_s() - self._state.began_s,
            workers=worker_statuses(record, self._cluster.workers) if record else (),
            pools=await pool_statuses(self._cluster),
            standbys=self._replanner.standbys().total() if self._replanner else 0,
            operations=tuple(self._told(operation) for operation in self._state.operations[-_LATEST:]),
            cordoned=tuple(sorted(self._state.cordoned & set(self._cluster.nodes))),
            detail=self._state.failure or self._under_way.trouble,
            emulated_step_ms=config.engine.emulated_step_ms,
        )

    async def scale(self, token: str, workers: int, dry_run: bool = False) -> OperationStatus | Preview:
        """Go to so many workers; the operation, or with ``dry_run`` what it would take.

        Raises
        ------
        OperatorError
            The token is wrong, or there cannot be so many.
        """
        self._admit(token)
        if isinstance(workers, bool) or not isinstance(workers, Integral):
            raise OperatorError(f"workers: {workers!r}; expected a whole number")
        if not dry_run and (current := self._asked("scale", str(workers))):
            return self._told(current)
        replanner = self._serving()
        base, way = await replanner.plan(lambda now, c: resized(now, workers, c))
        if dry_run:
            current = self._state.operation
            other = current is not None and self._asked("scale", str(workers)) is None and current.goal != way[-1]
            supersedes = f"{current.id} ({current.kind} {current.text})" if current is not None and other else ""
            return replace(preview(base, way[-1], way, replanner.standbys()), supersedes=supersedes)
        return await self._ask("scale", _change(base, way), way, subject=str(workers))

    async def rebalance(self, token: str) -> OperationStatus:
        """Let experts go where the loads measured so far want them; raises like `scale`, and without any loads."""
        self._admit(token)
        if current := self._asked("rebalance", _EXPERTS):
            return self._told(current)
        replanner = self._serving()
        kept = self._config.loads_file is not None and os.path.exists(self._config.loads_file)
        if not kept and (self._balancer is None or self._balancer.loads is None):
            raise OperatorError(
                "rebalance: too few tokens were routed since the controller started to tell hot experts from cold ones"
            )
        _, way = await replanner.plan(rebalanced)
        return await self._ask("rebalance", "for the measured loads", way, subject=_EXPERTS)

    async def drain(self, token: str, device: str, deadline_s: float | None = None) -> OperationStatus:
        """Take a device, or all of a node, out; raises like `scale`. A node gets no new devices then, until `undrain`.

        KV that is not handed over after ``deadline_s`` seconds is given up, and computed again elsewhere: also of
        devices there that are leaving already. If there are no others, the operation under way is not disturbed.
        """
        self._admit(token)
        _check_name("drain", device)
        if deadline_s is not None and not (isinstance(deadline_s, Real) and 0 <= deadline_s < inf):
            raise OperatorError(f"deadline: {deadline_s!r}; expected seconds, 0 or more")
        until_s = None if deadline_s is None else self._hands.now_s() + deadline_s  # planning takes of it
        replanner = self._serving()
        base = await replanner.look()
        leaving = replanner.leaving(base, device, until_s)
        current = self._asked("drain", leaving.node or device)
        if current is None and replanner.has_left(base, device):
            current = self._state.operation
        if current is None:
            base, way = await replanner.plan(lambda now, c: drained(now, device, c))
            leaving = replanner.leaving(base, device, until_s)
        else:
            way = current.route
        text, subject = f"{device}: {_change(base, way)}", leaving.node or device
        return await self._ask("drain", text, way, leaving, subject=subject)

    async def undrain(self, token: str, name: str) -> str:
        """Let a drained node take devices again; its id. Raises `OperatorError`: no such node, or a wrong token."""
        self._admit(token)
        _check_name("undrain", name)
        nodes = self._cluster.nodes
        hosts = {node: nodes[node].host if node in nodes else "" for node in sorted(self._state.cordoned)}
        found = nodes_called(name, hosts)
        if len(found) != 1:
            several = f"{len(found)} drained nodes are" if found else "no drained node is"
            raise OperatorError(f"undrain: {several} called {name!r}; drained: {', '.join(hosts) or 'none'}")
        self._state = replace(self._state, cordoned=self._state.cordoned - {found[0]})
        await self._save()
        return found[0]

    async def cancel(self, token: str, op_id: str) -> OperationStatus:
        """Give an operation up before its commit; raises `OperatorError` if that is not possible any more."""
        self._admit(token)
        self._state = cancel(self._state, op_id, self._hands.now_s())
        await self._save()
        self._woken()
        return self._told(next(o for o in self._state.operations if o.id == op_id))

    async def operation(self, token: str, op_id: str, wait_s: float = 0.0) -> OperationStatus:
        """An operation, as soon as it has ended, or after ``wait_s``."""
        self._admit(token)
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._changed:
                await self._changed.wait_for(lambda: self._find(op_id).outcome != "running")
        return self._told(self._find(op_id))

    def _all_reachable(self) -> bool:
        return bool(self._members.workers) and not self._members.awaited

    def _phase(self) -> str:
        state = self._state
        if state.serving is None:
            return "starting"
        if state.pending is None:
            return "recovering" if state.broken else "serving"
        return "recovering" if state.pending.recovery else "serving, " + state.pending.stage.value

    def _find(self, op_id: str) -> Operation:
        found = next((o for o in self._state.operations if o.id == op_id), None)
        if found is None:
            raise OperatorError(f"operation: {op_id!r} is unknown")
        return found

    def _told(self, operation: Operation) -> OperationStatus:
        moved = (self._moved.done, self._moved.total) if operation.id == self._moved.operation else (0, 0)
        return operation_status(operation, self._reason, self._state.began_s, moved, self._under_way.trouble)

    def _admit(self, token: str) -> None:
        if not hmac.compare_digest(token.encode(), self._config.token.encode()):
            raise WrongToken("token: it is not this deployment's")

    def _serving(self) -> Replanner:
        """What plans; raises `OperatorError` as long as nothing serves, or if nothing goes on any more."""
        if self._state.failure:
            raise OperatorError(f"the deployment has failed: {self._state.failure}")
        if self._replanner is None or self._state.serving is None:
            raise OperatorError("the deployment does not serve yet; ask again when it does")
        return self._replanner

    def _asked(self, kind: OperationKind, subject: str) -> Operation | None:
        """The operation under way, if it is this one."""
        current = self._state.operation
        return current if current is not None and (current.kind, current.subject) == (kind, subject) else None

    async def _ask(
        self,
        kind: OperationKind,
        text: str,
        way: tuple[Layout, ...],
        leaving: Leaving | None = None,
        *,
        subject: str = "",
    ) -> OperationStatus:
        self._state = request(self._state, kind, text, way, self._hands.now_s(), leaving, subject)
        operation = self._state.operations[-1]
        await self._save()
        self._woken()
        return self._told(operation)

    async def _save(self) -> None:
        """Make the state durable, as it is when its turn has come: the last one kept is the latest."""
        async with self._saving:
            await self._hands.save(pickle.dumps(self._state))

    def _begin(self, model: ModelFiles) -> None:
        registry = Registry(self._config, self._cluster, lambda: self._state)
        self._deeds = Deeds(model, registry, KVDeeds(registry))
        spec, config = model_spec(model.config), self._config
        self._balancer = balancer = Balancer(spec, config.rebalance_s, config.loads_file, self._hands.now_s)
        self._replanner = Replanner(registry, model, lambda: balancer.loads)
        self._loop = asyncio.create_task(self._run())

    def _woken(self) -> None:
        self._wake.set()

    async def _run(self) -> None:
        try:
            while True:
                await self._turn()
        except Exception as e:  # noqa: BLE001 - whatever ends the loop must end the deployment: nobody acts any more
            _log.exception("the controller's loop failed")
            failure = f"the controller's loop failed: {error_text(e)}"
            self._state = replace(end(self._state, "failed", failure, self._hands.now_s()), failure=failure)
            await self._tell()

    async def _turn(self) -> None:
        self._wake.clear()
        self._balance()
        await self._cluster.look_at_nodes()
        under_way = self._under_way
        # Nothing slow between this and the decision.
        snapshot = await self._cluster.look(under_way.busy, under_way.take_errors())
        deeds, operation = self._deeds, self._state.operation
        if operation is not None and deeds is not None:
            self._moved.note(operation.id, self._cluster.moved_bytes, deeds.wanted_bytes, deeds.coming_bytes)
        facts: dict[str, WorkerFact | PoolFact] = {**snapshot.workers, **snapshot.pools}
        for name, fact in facts.items():
            if fact.failed:
                _log.warning("%s has to be ended: %s", name, fact.failed)
        decision = step(self._state, snapshot)
        changed, self._state = decision.state.durable != self._state.durable, decision.state
        if changed:
            await self._save()
        if decision.reason != self._reason:
            _log.info("%s", decision.reason)
        self._reason = decision.reason
        under_way.start(decision.effects, alone=self._state.pending is None)
        await self._tell()
        # Not `wait_for`: until Python 3.12 it may forget that it was cancelled.
        with suppress(TimeoutError):
            async with asyncio.timeout(min(_TICK_S, max(0.0, decision.again_s - self._hands.now_s()))):
                await self._wake.wait()

    async def _tell(self) -> None:
        """Wake who waits for the state, or the list of members, to change."""
        heirs = self._deeds.kv.heirs if self._deeds is not None else {}
        for device in self._state.serving.layout.devices if self._state.serving is not None else ():
            heirs.pop(device, None)  # it has come again, and may leave again, to another one
        listed = member_list(self._state, self._cluster, self._under_way.tasks, heirs, self._members.version + 1)
        if replace(listed, version=self._members.version) != self._members:
            self._members = listed
        async with self._changed:
            self._changed.notify_all()

    def _balance(self) -> None:
        """Let experts move where the measured loads ask for it, one generation at a time."""
        state, balancer = self._state, self._balancer
        if balancer is None or state.serving is None or state.failure:
            return
        balancer.observe({name: member.report for name, member in self._cluster.workers.items()})
        planning = self._planning is not None and not self._planning.done()
        if not planning and state.pending is None and state.operation is None and balancer.due:
            self._planning = asyncio.create_task(self._follow_loads(balancer, state.serving.layout))

    async def _follow_loads(self, balancer: Balancer, layout: Layout) -> None:
        """Beside the loop: planning takes seconds, and a worker that dies meanwhile must not wait for it."""
        try:
            context = self._serving().context()
            better = await asyncio.to_thread(balancer.plan, context.site(layout.seats), layout.placement)
            if better is None:
                return
            way = await asyncio.to_thread(route, layout, placed(layout, better, context), context)
            serving = self._state.serving
            if self._state.operation is None and serving is not None and serving.layout == layout:
                await self._ask("rebalance", "following the measured loads", way, subject=_EXPERTS)
        except OperatorError as e:
            _log.warning("experts stay where they are: %s", e)
        except Exception:  # noqa: BLE001 - experts that stay where they are serve; ending that would be worse
            _log.exception("planning failed; experts stay where they are")

    async def _do(self, effect: Effect) -> None:
        assert self._deeds is not None
        await self._deeds.do(effect)

    def _ended(self, effect: Effect, failed: bool) -> None:
        self._cluster.touch(effect, failed=failed)  # a failure is perhaps by somebody's death
        self._woken()


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str):
        raise OperatorError(f"{what}: {name!r}; expected the name of a device or node")


def _change(base: Layout, way: tuple[Layout, ...]) -> str:
    return f"{len(base.seats)} -> {len(way[-1].seats)} workers"
