"""One transition with one fault, at a chosen effect. Who ran it is told how to see it again."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

from concertina.orchestrator.core.facts import Effect
from concertina.orchestrator.core.layout import Layout, MemoryMode, node_pool

from .core_layouts import make_layout, node_pages
from .core_processes import Violation, must
from .core_rest import check_rest
from .core_schedule import Schedule

FaultKind = Literal[
    "error before",
    "error after",
    "worker dies",
    "worker hangs",
    "engine fails",
    "owner dies",
    "owner hangs",
    "both die",
    "start hangs",
    "restart",
    "node dies",
]
_A = [(f"cpu-{i}", "a") for i in range(4)]
_AB = [(f"cpu-{i}", "ab"[i % 2]) for i in range(4)]
TRANSITIONS = {
    "grow": (_A[:2], _A),
    "shrink": (_A, _A[:2]),
    "replace": (_A[:3], [_A[0], _A[3]]),
    "all others": (_A[:2], _A[2:]),
}
ACROSS_NODES = {
    "grow ab": (_AB[:2], _AB),
    "shrink ab": (_AB, _AB[:2]),
    "leave b": (_AB[:3], _AB[:1]),
    "all others ab": (_AB[:3], [("cpu-4", "a")]),
}
_ALL = {**TRANSITIONS, **ACROSS_NODES}


class OneFault(Schedule):
    """From one layout to another; the fault comes when effect number ``at`` has begun, or right after it ended.

    Parameters
    ----------
    transition : str
        One of `TRANSITIONS` or `ACROSS_NODES`.
    fault : str or None
        ``node dies`` is the end of node b.
    at : int
        Effects are counted from the request on.
    late : bool
        After the effect has ended, or as much of it as can without others.
    """

    def __init__(
        self, transition: str, mode: MemoryMode, fault: FaultKind | None = None, at: int = -1, *, late: bool = False
    ) -> None:
        super().__init__(0, faults=False)
        self.fault, self.at, self.late = fault, at, late
        self.use(mode, node_pages([_layout(seats, mode) for pair in _ALL.values() for seats in pair]))
        self.way = tuple(self.layouts[2 * list(_ALL).index(transition) + i] for i in (0, 1))
        self.named = f"'{transition}' {mode} '{fault}' {at}{' late' if late else ''}"

    def play(self) -> OneFault:
        try:
            self.ask("start", self.way[:1])
            self.settle()
            self.began = self.started
            self.ask("scale", self.way[1:])
            self.settle()
            check_rest(self.state, self.world, self.routes)
            self._check_outcome()
        except Exception as e:
            again = f"python -m tests.orchestrator.test_simulation {self.named}"
            raise Violation(f"{self.named}: {e!r}; its trace: {again}") from e
        return self

    def _check_outcome(self) -> None:
        """A lost node may keep an operation from its goal; then it has failed, for a reason."""
        last, serving = self.state.operations[-1], self.state.serving
        if self.fault == "node dies":
            must(last.outcome in ("done", "failed"), f"C14: the operation is {last.outcome}: {last.reason}")
            return
        must(last.outcome == "done", f"C14: the operation has {last.outcome}: {last.reason}")
        must(serving is not None and serving.layout == self.way[1], "C14: elsewhere")

    def start(self, effect: Effect) -> None:
        super().start(effect)
        if self.requested == 2 and self.fault and self.started - self.began == self.at + 1:
            if self.late:
                self.finish(effect)
            self._inflict(effect)

    def finish(self, effect: Effect) -> None:
        for _ in range(8):
            if effect in self.world.busy:
                self.world.advance(effect)

    def _inflict(self, effect: Effect) -> None:
        world = self.world
        name = getattr(effect, "worker", getattr(effect, "heir", "")) or random.Random(self.at).choice([*world.workers])
        pool = getattr(effect, "pool", "") or node_pool("a")
        doings: dict[str, Callable[[], object]] = {
            "error before": lambda: world.fail(effect, after=False),
            "error after": lambda: world.fail(effect, after=True),
            "worker dies": lambda: world.end_worker(name),
            "worker hangs": lambda: name in world.workers and world.hang(name),
            "engine fails": lambda: name in world.workers and world.break_engine(name),
            "owner dies": lambda: pool in world.owners and world.end_owner(pool),
            "owner hangs": lambda: pool in world.owners and world.hang_owner(pool),
            "both die": lambda: (world.end_worker(name), pool in world.owners and world.end_owner(pool)),
            "start hangs": lambda: world.hang_start(effect),
            "restart": self.restart,
            "node dies": lambda: world.end_node("b"),
        }
        self.note(f"FAULT {self.fault} at {effect}")
        doings[self.fault or ""]()


def _layout(seats: list[tuple[str, str]], mode: MemoryMode) -> Layout:
    exchange = "solo" if len(seats) == 1 else "shared" if len({node for _, node in seats}) == 1 else "gloo"
    return make_layout(seats, exchange, mode)
