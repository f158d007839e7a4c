"""Sends each sequence to the worker that would be done with it first, and on to another one when that is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import replace

from ...errors import OperatorError
from ...workers.engine.errors import QueueFull
from ...workers.protocol import EngineOutput, EngineRequest
from .continuation import Continuation
from .lane import LOST, Lane
from .members import Connect, Member, NoWorker, StreamLost
from .prefixes import PrefixMemory

PAUSE_S = 0.1  # before an interrupted sequence asks workers again that were full, or gave it up


class Router:
    """Knows the workers and shares sequences out among them. Lives in one event loop.

    Parameters
    ----------
    connect : callable
        Makes a connection to a member.
    worker_wait_s, recovery_timeout_s : float
        See `IngressSettings`.
    """

    def __init__(self, connect: Connect, worker_wait_s: float = 5.0, recovery_timeout_s: float = 60.0) -> None:
        self._connect = connect
        self._worker_wait_s = worker_wait_s
        self._recovery_timeout_s = recovery_timeout_s
        self._lanes: dict[str, Lane] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._prefixes = PrefixMemory()
        self._change = asyncio.Event()

    @property
    def lanes(self) -> Collection[Lane]:
        return self._lanes.values()

    @property
    def ready(self) -> bool:
        """Some worker takes requests."""
        return any(lane.ready for lane in self._lanes.values())

    def update(self, members: Sequence[Member]) -> None:
        """Make these the members, from now on; level-triggered, so that repeating it changes nothing.

        A member that is new, or has another address, is connected to in the background. Sequences on one that is
        gone from the list go on elsewhere; to let them end where they are, keep it and mark it as draining.

        Raises
        ------
        OperatorError
            Two members share a name; nothing is changed.
        """
        wanted = {member.name: member for member in members}
        if len(wanted) != len(members):
            raise OperatorError(f"ingress: members: names repeat: {sorted(m.name for m in members)}")
        for name, lane in list(self._lanes.items()):
            if name not in wanted or _address(lane.member) != _address(wanted[name]):
                self._retire(self._lanes.pop(name))
        for name, member in wanted.items():
            if name in self._lanes:
                self._lanes[name].member = member
            else:
                self._lanes[name] = Lane(member, self._connect, self._notify)
        self._notify()

    async def stream(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Outputs of a sequence up to its end, whatever workers come and go meanwhile.

        Closing the generator earlier aborts the sequence.

        Raises
        ------
        NoWorker
            No worker could be reached for ``worker_wait_s``.
        StreamLost
            Its worker was lost, and nobody took over within ``recovery_timeout_s``.
        RequestRefused
            The engine does not take the request; `QueueFull` when none has room.
        """
        state = Continuation(request)
        avoid: set[str] = set()
        started_s = self._now_s()
        while not state.finished:
            lane = await self._choose(state, avoid, started_s)
            try:
                async with aclosing(self._attempt(lane, state)) as outputs:
                    async for output in outputs:
                        yield output
            except QueueFull:
                avoid.add(lane.member.name)
            except LOST as e:
                avoid.add(lane.member.name)
                if last := state.interrupted(str(e), self._now_s()):
                    yield last
        self._prefixes.remember(state.tokens, lane.member.name)

    async def close(self) -> None:
        """Close every connection."""
        self.update(())
        await asyncio.gather(*self._closing)

    async def _attempt(self, lane: Lane, state: Continuation) -> AsyncGenerator[EngineOutput, None]:
        request = state.next_request()
        self._prefixes.remember(request.prompt, lane.member.name)
        async with aclosing(lane.submit(request)) as outputs:
            async for output in outputs:
                if noted := state.note(output):
                    yield noted
        if not state.finished:
            raise EOFError(f"worker {lane.member.name} gave the sequence up")

    async def _choose(self, state: Continuation, avoid: set[str], started_s: float) -> Lane:
        while True:
            ready = [lane for lane in self._lanes.values() if lane.ready]
            free = [lane for lane in ready if lane.member.name not in avoid]
            if free:
                return self._cheapest(free, state.tokens)
            if ready and state.interrupted_at_s is None:
                raise QueueFull("every worker's queue is full")
            avoid.clear()
            await self._wait(self._time_left_s(state, started_s), at_most_s=PAUSE_S if ready else None)

    def _cheapest(self, lanes: Sequence[Lane], tokens: Sequence[int]) -> Lane:
        """The worker that would be done first: work before this request, and the part of its prompt not cached."""
        cached = self._prefixes.longest(tokens)

        def cost(lane: Lane) -> tuple[float, int]:
            todo = lane.outstanding + len(tokens) - cached.get(lane.member.name, 0)
            return todo / lane.member.speed, lane.sequences

        return min(lanes, key=cost)

    def _time_left_s(self, state: Continuation, started_s: float) -> float:
        lost_s = state.interrupted_at_s
        if lost_s is None:
            left_s = started_s + self._worker_wait_s - self._now_s()
            if left_s <= 0:
                raise NoWorker(f"no worker available for {self._worker_wait_s:g} s")
            return left_s
        left_s = lost_s + self._recovery_timeout_s - self._now_s()
        if left_s <= 0:
            raise StreamLost(f"no worker took the sequence over within {self._recovery_timeout_s:g} s")
        return left_s

    async def _wait(self, left_s: float, at_most_s: float | None) -> None:
        timeout_s = left_s if at_most_s is None else min(left_s, at_most_s)
        try:
            async with asyncio.timeout(timeout_s):
                await self._change.wait()
        except TimeoutError:
            return  # the caller looks at the clock again

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _retire(self, lane: Lane) -> None:
        task = asyncio.create_task(lane.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()


def _address(member: Member) -> Member:
    return replace(member, speed=1.0, draining=False)
