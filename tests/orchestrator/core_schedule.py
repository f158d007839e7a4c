"""One random history of a deployment: requests, faults and delays, then quiet, in which all must come to rest.

Everything follows from the seed. `Schedule.play` raises `Violation` with the seed if an invariant does not hold.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from math import inf
from typing import get_args

from concertina.errors import OperatorError
from concertina.orchestrator.core.attempts import opens_s
from concertina.orchestrator.core.facts import Commit, Effect, Free, Prepare, Snapshot
from concertina.orchestrator.core.layout import Layout, MemoryMode
from concertina.orchestrator.core.leftovers import heirs_at_switch
from concertina.orchestrator.core.operations import cancel, request
from concertina.orchestrator.core.state import Leaving, OperationKind, Stage, State
from concertina.orchestrator.core.step import step

from .core_layouts import family
from .core_processes import Violation, must
from .core_rest import check_rest
from .core_world import World

_FAULTS = 4  # few enough that giving up is never right
_ACTIONS = 60
_ROUNDS = 160


class Schedule:
    """A deployment and its world, moved along by random actions.

    Parameters
    ----------
    seed : int
    faults : bool
        Whether anything fails, dies, hangs or is lost; else only orders and delays are random.
    """

    def __init__(self, seed: int, *, faults: bool = True) -> None:
        self.seed, self.faults, self.log = seed, faults, list[str]()
        self.order = order = random.Random(seed)
        mode: MemoryMode = order.choice(("shared", "separate"))
        self.faults_left = order.randint(1, _FAULTS) if faults else 0
        self.stale = order.choice((0.0, 0.2)) if faults else 0.0
        self.world = World(order)
        self.layouts: tuple[Layout, ...] = ()
        self.use(mode, family(mode, order.choice((1, 2))))
        self.state = self.saved = State(standbys=order.choice((0, 0, 1)))
        self.ended: dict[tuple[str, float], str] = {}
        self.requested = self.started = 0
        self.routes: dict[str, tuple[Layout, ...]] = {}  # of every operation
        self.again_s = self.opens_s = inf  # until when anything, and the next generation, is put off

    def use(self, mode: MemoryMode, layouts: tuple[Layout, ...]) -> None:
        """Go between these layouts."""
        self.layouts = layouts
        self.world.device_pages = layouts[0].memory.device_pages if mode == "separate" else None

    def play(self) -> Schedule:
        """The whole history.

        Raises
        ------
        Violation
            With the seed, and how to replay it.
        """
        try:
            self.ask("start", (self._reachable(),))
            self.settle()
            for _ in range(self.order.randint(_ACTIONS // 3, _ACTIONS)):
                self._act()
                self.world.check()
            self.rest()
        except Exception as e:
            again = f"python -m tests.orchestrator.test_simulation {self.seed}{'' if self.faults else ' --no-faults'}"
            raise Violation(f"seed {self.seed}: {e!r}; its trace: {again}") from e
        return self

    def rest(self) -> None:
        """No more faults; within a bounded time all is as it should be."""
        self.faults_left, self.stale = 0, 0.0
        self.note("quiet from here on")
        self.settle()
        check_rest(self.state, self.world, self.routes)
        must(not self.turn(), "C4: at rest something is asked for")

    def turn(self) -> tuple[Effect, ...]:
        """The controller looks, decides, makes its state durable, and starts what was decided."""
        snapshot = self.world.snapshot(self.stale)
        decision = step(self.state, snapshot)
        must(not decision.state.failure, f"C9: given up: {decision.state.failure}")
        must(not set(decision.effects) & snapshot.busy, "C4: something under way was asked for")
        now_s, opened = self.world.now_s, decision.state.next_generation > self.state.next_generation
        must(not opened or self.opens_s == inf or now_s >= self.opens_s, f"C16: opened before {self.opens_s}")
        self.again_s = decision.again_s
        self.opens_s = opens_s(decision.state) if decision.state.pending is None else inf
        self.state = decision.state
        if self.state.durable != self.saved.durable:
            self.saved = self.state
        pending = self.state.pending
        self.world.wanted = (self.state.serving, pending.record if pending is not None else None)
        self.world.formed = pending is not None and pending.stage in (Stage.PREPARE, Stage.COMMIT)
        if pending is not None:
            self.world.records[pending.record.id] = pending.record
            self.world.heirs[pending.record.id] = heirs_at_switch(self.state)
        self.note(f"turn: {decision.reason}" + "".join(f"\n      {effect}" for effect in decision.effects))
        for effect in decision.effects:
            self._check_asked(effect, snapshot)
            self.start(effect)
        self._check_ended()
        return decision.effects

    def start(self, effect: Effect) -> None:
        self.started += 1
        self.world.start(effect)

    def settle(self) -> None:
        """Let everything under way go on, in any order, until nothing is left to do."""
        for _ in range(_ROUNDS):
            asked = self.turn()
            if not asked and self._quiet():
                return
            for effect in self.order.sample(list(self.world.busy), len(self.world.busy)):
                if self.order.random() < 0.8:
                    self._advance(effect)
            self._others()
            self.world.check()
        raise Violation(f"C9: it does not come to rest: {self.state}, {self.world.workers}")

    def note(self, what: str) -> None:
        self.log.append(f"{self.world.now_s:6.2f} {what}")

    def _quiet(self) -> bool:
        world = self.world
        hung = any(w.hung_since_s is not None for w in world.workers.values())
        hidden = world.nodes_known != world.nodes_alive or bool(world.orphans) or bool(world.snapshot_lags())
        state = self.state
        waits = state.pending is not None or state.operation is not None or self.again_s < inf
        return not (world.busy or hung or hidden or waits)

    def _others(self) -> None:
        """What processes do of themselves."""
        world = self.world
        for orphan in list(world.orphans):
            world.advance_orphan(orphan)
        for generation in world.running():
            world.boundary(generation)
        world.park_somebody()
        if self.order.random() < 0.3:
            world.nodes_known = set(world.nodes_alive)
        world.now_s += self.order.choice((0.1, 0.5, 2.0))

    def _act(self) -> None:
        doings: list[tuple[int, Callable[[], object]]] = [
            (30, self.turn),
            (30, self._one_effect),
            (8, lambda: self._boundary()),
            (4, self.world.park_somebody),
            (4, self._orphan),
            (4, self._wait),
            (4, self._request),
            (1, self._cancel),
        ]
        if self.faults_left:  # more of them where most can go wrong
            doings.append((30 if any(isinstance(effect, Commit) for effect in self.world.busy) else 8, self._fault))
        self.order.choices([do for _, do in doings], [weight for weight, _ in doings])[0]()

    def _wait(self) -> None:
        self.world.now_s += self.order.choice((0.1, 0.5, 2.0))
        if self.order.random() < 0.5:
            self.world.nodes_known = set(self.world.nodes_alive)

    def _one_effect(self) -> None:
        if self.world.busy:
            self._advance(self.order.choice(list(self.world.busy)))

    def _advance(self, effect: Effect) -> None:
        self.world.advance(effect)
        if effect not in self.world.busy or effect in self.world.errors:
            self.note(f"ended: {effect} {self.world.errors.get(effect, '')}")

    def _boundary(self) -> None:
        for generation in self.world.running():
            self.world.boundary(generation)

    def _orphan(self) -> None:
        if self.world.orphans:
            self.world.advance_orphan(self.order.choice(self.world.orphans))

    # Requests

    def _reachable(self) -> Layout:
        known = self.world.nodes_known
        return self.order.choice([layout for layout in self.layouts if set(layout.nodes) <= known])

    def _request(self) -> None:
        """Any layout may be what some operation leads to; a drain also says until when, and names a node."""
        order, route = self.order, tuple(self._reachable() for _ in range(self.order.choice((1, 1, 1, 2))))
        kind, leaving = order.choice(get_args(OperationKind)[1:]), None
        if kind == "drain":
            until_s = {device: self.world.now_s + 1.0 for device in route[0].devices if order.random() < 0.3}
            leaving = Leaving(until_s, order.choice(("", "b")), begun=order.random() < 0.3)
        self.ask(kind, route, leaving, order.choice(("", "cpu-1", "3")))

    def ask(
        self, kind: OperationKind, route: tuple[Layout, ...], leaving: Leaving | None = None, subject: str = ""
    ) -> None:
        self.requested += 1
        before = self.state
        self.state = request(before, kind, f"#{self.requested}", route, self.world.now_s, leaving, subject)
        if self.state.next_operation > before.next_operation:
            self.routes[self.state.operations[-1].id] = route
        if before.operation is not None and self.state.operations[-1].id != before.operation.id:
            told = next(o for o in self.state.operations if o.id == before.operation.id)
            must(told.outcome == "superseded", f"C13: {told.id} is {told.outcome}, and another one was begun")
        self.again_s = inf
        if self.state.pending is None:
            self.opens_s = opens_s(self.state)  # the failures of another one do not put it off
        self.note(f"asked to {kind} {subject}: {[layout.devices for layout in route]} {leaving or ''}")

    def _cancel(self) -> None:
        operation, pending = self.state.operation, self.state.pending
        if operation is None or operation.kind == "start":
            return
        try:
            self.state = cancel(self.state, operation.id, self.world.now_s)
        except OperatorError:
            serving = self.state.serving
            begun = bool(operation.committed_s) or (serving is not None and serving.layout in operation.route)
            if pending is not None and pending.stage is Stage.COMMIT and not pending.recovery:
                begun = begun or pending.record.layout in operation.route
            must(begun, "C13: an operation before its commit could not be canceled")
            return
        must(self.state.operations[-1].outcome == "canceled", "C13: a canceled operation has another outcome")
        self.note(f"canceled {operation.id}")

    # Faults

    def _fault(self) -> None:
        self.faults_left -= 1
        world, order = self.world, self.order
        workers, owners = sorted(world.workers), sorted(world.owners)
        faults: list[Callable[[], object]] = [self.restart]
        if world.busy:
            switching = [effect for effect in world.busy if isinstance(effect, Commit)]
            effect = order.choice(switching if switching and order.random() < 0.5 else list(world.busy))
            faults += [lambda: world.fail(effect, after=False), lambda: world.fail(effect, after=True)]
            faults += [lambda: world.double(effect), lambda: world.hang_start(effect)]
        if workers:
            name = order.choice(workers)
            faults += [
                lambda: world.end_worker(name),
                lambda: world.hang(name),
                lambda: world.break_engine(name),
                lambda: self._both(name),
            ]
        if owners:
            pool = order.choice(owners)
            faults += [lambda: world.end_owner(pool), lambda: world.hang_owner(pool)]
        faults += [self._node, self._bad_boundary]
        number = order.randrange(len(faults))
        self.note(f"FAULT {number} of {len(faults)}")
        before = (set(world.workers), set(world.owners))
        faults[number]()
        gone = [sorted(before[0] - set(world.workers)), sorted(before[1] - set(world.owners))]
        self.note(f"  gone: {gone}, errors {world.errors}")

    def restart(self) -> None:
        self.note("the controller starts anew")
        self.world.restart()
        self.state = self.saved

    def _both(self, name: str) -> None:
        """A worker and an owner that it maps."""
        pools = {pool.name for worker, pool in self._mapped() if worker == name}
        self.world.end_worker(name)
        for pool in sorted(pools & set(self.world.owners)):
            self.world.end_owner(pool)

    def _mapped(self) -> list[tuple[str, object]]:
        return [(w.name, p) for name in self.world.owners for w, p in self.world.mappings(name)]  # type: ignore[misc]

    def _node(self) -> None:
        if "b" not in self.world.nodes_alive:
            self.world.nodes_alive.add("b")
            self.world.nodes_known.add("b")
            return
        self.world.end_node("b")
        if self.order.random() < 0.5:
            self.world.nodes_known = set(self.world.nodes_alive)

    def _bad_boundary(self) -> None:
        for generation in self.world.running():
            self.world.boundary(generation, dies=True)

    # Invariants of what is decided

    def _check_asked(self, effect: Effect, snapshot: Snapshot) -> None:
        record = self.world.records.get(getattr(effect, "generation", 0))
        if isinstance(effect, Prepare) and record is not None:
            for pool, requests in record.layout.extents(record.id).items():
                there = set(snapshot.pools[pool].pages) if pool in snapshot.pools else set()
                must({r.key for r in requests} <= there, f"C2: {effect}, and extents of {pool} are missing")
        pending = self.state.pending
        if isinstance(effect, Commit) and pending is not None and pending.record.id == effect.generation:
            lacking = set(pending.record.workers) - self.world.ever_prepared.get(effect.generation, set())
            must(not lacking, f"C2: {effect}, which {lacking} have not prepared")
        if isinstance(effect, Free):
            kv = [key for key in effect.keys if key.startswith("kv/")]
            must(not kv or (pending is not None and pending.recovery), f"C11: {kv} to be freed, and not handed over")
            keys = self.world.needed(effect.pool) & set(effect.keys)
            must(not keys, f"C11: {keys} of {effect.pool} to be freed, which a generation needs")

    def _check_ended(self) -> None:
        for operation in self.saved.operations:
            key = (operation.text, operation.started_s)
            told = self.ended.get(key)
            must(told in (None, operation.outcome), f"C13: {operation.id} was {told} and is {operation.outcome}")
            if operation.outcome != "running":
                must(operation.outcome == "done" or bool(operation.reason), f"C13: {operation.id} ended without reason")
                self.ended[key] = operation.outcome
