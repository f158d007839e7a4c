"""Sends each sequence to the worker that would be done with it first, and on to where its KV went when that changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence, Set
from contextlib import aclosing
from dataclasses import dataclass, field

from ...workers.engine.errors import CacheTooSmall, QueueFull, RequestRefused
from ...workers.protocol import EngineOutput, EngineRequest
from .continuation import Continuation
from .lane import Lane
from .lanes import CONNECT_S, Lanes
from .members import Connect, Member, NoWorker, StreamLost, WorkerLost
from .prefixes import PrefixMemory

PAUSE_S = 0.1  # before workers that were full, or gave it up, are asked again for an interrupted sequence
ROOM_S = 1.0  # before those are whose cache is too small for it: that changes with members, and else only slowly


@dataclass(slots=True)
class _Way:
    """One sequence on its way from worker to worker.

    ``avoid``: names of members that would not have it. ``home``: the device that has its KV, as far as is known.
    ``refusal``: why one of them would not, a full queue rather than a cache that is too small. ``lost``: the lane that
    broke. ``moved``: its worker handed it over to ``home``.
    """

    state: Continuation
    started_s: float
    avoid: set[str] = field(default_factory=set)
    refusal: RequestRefused | None = None
    home: str = ""
    lost: Lane | None = None
    moved: bool = False

    def refused(self, refusal: RequestRefused) -> None:
        if not isinstance(self.refusal, QueueFull):
            self.refusal = refusal

    def forgive(self) -> None:
        """Whoever would not have it may be asked again."""
        self.avoid.clear()
        self.refusal = None


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
        self._worker_wait_s = worker_wait_s
        self._recovery_timeout_s = recovery_timeout_s
        self._lanes = Lanes(connect, self._now_s)
        self._prefixes = PrefixMemory()
        self._heirs: Set[tuple[str, str]] = frozenset()  # as last told, of devices that left

    @property
    def lanes(self) -> Collection[Lane]:
        return self._lanes.all

    @property
    def awaited(self) -> frozenset[str]:
        """Devices whose worker is being replaced."""
        return self._lanes.awaited

    @property
    def workers(self) -> int:
        """Devices that take requests, or will once their worker is replaced or connected to; at least 1."""
        return max(1, len(self.awaited.union(x.member.device for x in self.lanes if not x.member.draining)))

    @property
    def ready(self) -> bool:
        """Some worker takes requests, or will in a moment."""
        return self._lanes.ready

    def update(
        self, members: Sequence[Member], awaited: Set[str] = frozenset(), heirs: Mapping[str, str] | None = None
    ) -> None:
        """Make these the members, from now on; level-triggered, so that repeating it changes nothing.

        A member that is new, or has another address, is connected to in the background. Sequences on one that is
        gone from the list go on elsewhere, a moment later; to let them end where they are, keep it and mark it as
        draining.

        Parameters
        ----------
        members : sequence of Member
        awaited : set of str
            Devices whose worker is being replaced: their sequences wait for the new one, which has their KV.
        heirs : mapping of str to str
            Devices that left, and those that have their KV now: sequences whose worker died as it left go on there.

        Raises
        ------
        OperatorError
            Two members share a name; nothing is changed.
        """
        heirs = heirs or {}
        for device, heir in heirs.items() - self._heirs:
            self._prefixes.inherit(device, heir)
        self._heirs = frozenset(heirs.items())
        self._lanes.update(members, awaited, heirs)
        self._prefixes.forget_others({*awaited, *heirs, *heirs.values(), *(member.device for member in members)})

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
            The engine does not take the request; `QueueFull` when none has room, `CacheTooSmall` when none ever will.
        """
        way = _Way(Continuation(request), self._now_s())
        while not way.state.finished:
            lane = await self._choose(way)
            way.lost, way.moved = None, False
            try:
                async with aclosing(self._attempt(lane, way)) as outputs:
                    async for output in outputs:
                        yield output
            except (QueueFull, CacheTooSmall) as e:
                way.avoid.add(lane.member.name)
                way.refused(e)
            except WorkerLost as e:
                way.home, way.lost = lane.member.device, lane
                if last := way.state.lost(e, self._now_s()):
                    yield last

    async def close(self) -> None:
        """Close every connection."""
        await self._lanes.close()

    async def _attempt(self, lane: Lane, way: _Way) -> AsyncGenerator[EngineOutput, None]:
        request = way.state.next_request()
        self._prefixes.remember(request.prompt, lane.member.device)
        way.avoid.add(lane.member.name)  # unless it gets somewhere there
        async with aclosing(lane.submit(request)) as outputs:
            async for output in outputs:
                if output.token_ids:
                    way.forgive()  # whoever was full then may be the one that has its KV now
                if output.finish_reason == "moved":
                    self._move(lane.member.device, way, output.moved_to)
                noted = way.state.note(output)
                if way.state.finished:  # before its reader has that: nobody asks for more
                    self._prefixes.remember(way.state.tokens, lane.member.device)
                if noted:
                    yield noted
        if not way.moved:
            way.home = lane.member.device
        if not way.state.finished:  # the worker gave it up or handed it over
            way.avoid.add(lane.member.name)
            if last := way.state.interrupted(self._now_s()):
                yield last

    def _move(self, device: str, way: _Way, heir: str) -> None:
        if heir:
            way.home, way.moved = heir, True
            self._prefixes.inherit(device, heir)

    async def _choose(self, way: _Way) -> Lane:
        while True:
            if way.home and self._lanes.at(way.home) is None:
                self._move(way.home, way, self._lanes.heirs.get(way.home, ""))
            hold_s = self._hold_s(way)
            if hold_s <= 0 and (lane := self._pick(way)):
                return lane
            nobody = hold_s <= 0 and self._someone_ready()  # of them would have it
            if nobody and way.state.interrupted_at_s is None:
                self._give_up(way.refusal)
            left_s = hold_s if hold_s > 0 else self._time_left_s(way)
            if nobody:
                left_s = min(left_s, ROOM_S if isinstance(way.refusal, CacheTooSmall) else PAUSE_S)
                way.forgive()
            await self._lanes.changed(left_s)

    def _give_up(self, refusal: RequestRefused | None) -> None:
        if not isinstance(refusal, CacheTooSmall):
            raise QueueFull("every worker's queue is full")
        if not self._lanes.coming_s:  # else who comes may have more memory
            raise refusal

    def _someone_ready(self) -> bool:
        return any(lane.ready for lane in self._lanes.all)

    def _pick(self, way: _Way) -> Lane | None:
        heir = self._lanes.at(way.home) if way.moved or way.lost else None  # who has its KV
        if heir is not None and heir.ready and heir.member.name not in way.avoid:
            return heir
        open_ = self._lanes.open_to(way.avoid)
        return self._cheapest(open_, way) if open_ else None

    def _cheapest(self, lanes: Sequence[Lane], way: _Way) -> Lane:
        """The worker that would be done first: work before this request, and the part of its prompt not cached."""
        tokens = way.state.tokens
        cached = self._prefixes.longest(tokens)
        if way.state.interrupted_at_s is not None:
            cached[way.home] = len(tokens)  # not only whole blocks: everything was computed there

        def cost(lane: Lane) -> tuple[float, int]:
            todo = lane.outstanding + len(tokens) - cached.get(lane.member.device, 0)
            return todo / lane.member.speed, lane.sequences

        return min(lanes, key=cost)

    def _hold_s(self, way: _Way) -> float:
        """How long an interrupted sequence should wait for a worker on the device that has its KV; 0: no longer."""
        since_s = way.state.interrupted_at_s
        if since_s is None or not (way.lost or way.moved):
            return 0.0
        recovery_s = since_s + self._recovery_timeout_s - self._now_s()
        heir = self._lanes.at(way.home)
        if heir is not None and heir.ready and heir.member.name not in way.avoid:
            return 0.0
        # Until its member is taken from the list, nobody has decided yet what becomes of the device.
        undecided = way.lost is not None and self._lanes.is_listed(way.lost) and not way.lost.connected
        if undecided or way.home in self._lanes.awaited:
            return max(0.0, recovery_s)
        if heir is None or heir.connected:
            return 0.0
        return max(0.0, min(recovery_s, max(since_s, heir.born_s) + CONNECT_S - self._now_s()))

    def _time_left_s(self, way: _Way) -> float:
        lost_s = way.state.interrupted_at_s
        why = f": {way.refusal}" if way.refusal else ""
        if lost_s is None:
            waited_s = self._now_s() - way.started_s
            left_s = max(self._worker_wait_s - waited_s, min(self._lanes.coming_s, self._recovery_timeout_s - waited_s))
            if left_s <= 0:
                raise NoWorker(f"no worker available for {waited_s:.1f} s{why}")
            return left_s
        left_s = lost_s + self._recovery_timeout_s - self._now_s()
        if left_s <= 0:
            raise StreamLost(f"no worker took the sequence over within {self._recovery_timeout_s:g} s{why}")
        return left_s

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()
