"""A fleet of toy workers to which everything happens that a controller and its machines can do to them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from concertina.orchestrator.ingress.members import Member
from concertina.orchestrator.ingress.router import Router
from concertina.workers.protocol import EngineLoad
from hypothesis import strategies as st

from .toy import ToyWorker, connect_to

DEVICES = ("d0", "d1", "d2")
Kind = Literal[
    "kill", "notice", "replace", "retire", "release", "lose", "forget", "cut", "give up", "park", "go on", "tell"
]
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]
Event = tuple[Kind, str, str, int]

# What happens, to which device, which other device has a part in it, and how many steps pass until the next event.
events = st.tuples(st.sampled_from(KINDS), st.sampled_from(DEVICES), st.sampled_from(DEVICES), st.integers(0, 4))


class Fleet:
    """One worker per device at most, and those that are leaving.

    What the router knows of it lags behind: it is told by ``tell`` only.

    Parameters
    ----------
    batch : int
        Tokens per output.
    """

    def __init__(self, batch: int = 1) -> None:
        self._batch = batch
        self.workers: list[ToyWorker] = []
        self.at: dict[str, ToyWorker] = {}
        self.leaving: dict[str, ToyWorker] = {}
        self.awaited: set[str] = set()
        self.heirs: dict[str, str] = {}
        for device in DEVICES:
            self._start(device)
        self.router = Router(connect_to(self.workers), 5.0, 10.0)
        self.tell()

    def tell(self) -> None:
        members = [w.member for w in self.at.values()]
        leaving = [Member(w.name, "toy", 1, draining=True, device=w.device) for w in self.leaving.values()]
        heirs = {device: heir for device, heir in self.heirs.items() if device not in self.at and heir in self.at}
        self.router.update([*members, *leaving], self.awaited, heirs)

    async def suffer(self, happenings: Sequence[Event]) -> None:
        """Let it all happen; in the end every device has a worker and the router knows it."""
        for kind, device, other, steps in happenings:
            self._happen(kind, device, other)
            for _ in range(steps):
                await asyncio.sleep(0.0005)
        for device in DEVICES:
            self._happen("release", device, device)
            self._happen("notice", device, device)
            self._happen("replace", device, device)
            self._happen("go on", device, device)
        self.tell()

    def _happen(self, kind: Kind, device: str, other: str) -> None:
        worker, leaver = self.at.get(device), self.leaving.get(device)
        if kind == "replace":
            if worker is None and leaver is None:
                self._start(device)
        elif kind == "release":
            if leaver is not None:
                leaver.hand_over(other if other in self.at else "")
                del self.leaving[device]
        elif kind == "lose":
            if leaver is not None:
                leaver.kill()
                del self.leaving[device]
                self.heirs[device] = other
        elif kind == "tell":
            self.tell()
        elif worker is not None:
            self._befall(worker, kind, device)

    def _befall(self, worker: ToyWorker, kind: Kind, device: str) -> None:
        if kind == "kill":
            worker.kill()
        elif kind == "notice" and worker.down:
            del self.at[device]
            self.awaited.add(device)
        elif kind == "retire" and len(self.at) > 1 and not worker.down:
            self.leaving[device] = self.at.pop(device)
            worker.gate.clear()  # silent until it hands over
        elif kind == "forget" and len(self.at) > 1:
            del self.at[device]
        elif kind == "cut":
            worker.cut()
        elif kind == "give up":
            worker.give_up_after = 2
        elif kind == "park":
            worker.gate.clear()
        elif kind == "go on":
            worker.give_up_after = None
            worker.gate.set()

    def _start(self, device: str) -> None:
        name = f"{device}.{len(self.workers)}"
        waiting = EngineLoad(waiting=1000)  # nobody is to blame for what happens here
        worker = ToyWorker(name, batch=self._batch, device=device, step_s=0.0005, load=waiting)
        self.workers.append(worker)
        self.at[device] = worker
        self.awaited.discard(device)
