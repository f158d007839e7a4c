"""The lanes to all members, kept in line with the latest roster."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import replace

from ...errors import OperatorError
from .lane import Lane
from .members import Connect, Member

GRACE_S = 5.0  # so long nobody may be connected before the endpoint says that it is not ready
CONNECT_S = 2.0  # that a connection to a worker may take, or to one that comes in its place
LINGER_S = 2.0  # that a worker which is not listed any more has for saying where its sequences went


class Lanes:
    """A lane for each member. Lives in one event loop.

    Parameters
    ----------
    connect : callable
        Makes a connection to a member.
    now_s : callable
        The event loop's clock.
    """

    def __init__(self, connect: Connect, now_s: Callable[[], float]) -> None:
        self._connect = connect
        self._now_s = now_s
        self._lanes: dict[str, Lane] = {}
        self._closing: dict[Lane, asyncio.Task[None]] = {}
        self._ready_s = -math.inf
        self._change = asyncio.Event()
        self.awaited: frozenset[str] = frozenset()
        self.heirs: Mapping[str, str] = {}

    @property
    def all(self) -> Collection[Lane]:
        return self._lanes.values()

    @property
    def ready(self) -> bool:
        """Some member takes requests, or will in a moment: one did just now, or a device's worker is being replaced."""
        if self.awaited or any(lane.ready for lane in self.all):
            return True
        latest_s = max([self._ready_s, *(lane.ready_s for lane in self.all)])
        return bool(self._lanes) and self._now_s() - latest_s < GRACE_S

    @property
    def coming_s(self) -> float:
        """For how long somebody may be waited for who is awaited (without limit), or listed and being connected to."""
        if self.awaited:
            return math.inf
        missing = (lane for lane in self.all if not lane.connected and not lane.member.draining)
        latest_s = max((max(lane.born_s, lane.ready_s) for lane in missing), default=-math.inf)
        return max(0.0, latest_s + CONNECT_S - self._now_s())

    def update(self, members: Sequence[Member], awaited: Set[str], heirs: Mapping[str, str]) -> None:
        """See `Router.update`."""
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
        self.awaited, self.heirs = frozenset(awaited), heirs
        self._notify()

    def open_to(self, avoid: Set[str]) -> list[Lane]:
        """Ready lanes except those to avoid; of awaited devices only where there are no others."""
        ready = [lane for lane in self.all if lane.ready and lane.member.name not in avoid]
        return [lane for lane in ready if lane.member.device not in self.awaited] or ready

    def at(self, device: str) -> Lane | None:
        """The lane to whoever takes requests on a device, connected or not; the youngest one."""
        found = [lane for lane in self.all if lane.member.device == device and not lane.member.draining]
        return max(found, key=lambda lane: (lane.ready, lane.born_s), default=None)

    def is_listed(self, lane: Lane) -> bool:
        """Its member is one still, at the same address."""
        return self._lanes.get(lane.member.name) is lane

    async def changed(self, timeout_s: float) -> None:
        """Return at the next change of members or connections, or after the time-out."""
        change = self._change
        try:
            async with asyncio.timeout(timeout_s):
                await change.wait()
        except TimeoutError:
            return  # the caller looks at the clock

    async def close(self) -> None:
        """Close every connection now."""
        self.update((), frozenset(), {})
        await asyncio.gather(*(lane.close() for lane in self._closing), *self._closing.values())

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _retire(self, lane: Lane) -> None:
        self._ready_s = max(self._ready_s, self._now_s() if lane.ready else lane.ready_s)
        task = asyncio.create_task(lane.close(LINGER_S))
        self._closing[lane] = task
        task.add_done_callback(lambda _: self._closing.pop(lane, None))


def _address(member: Member) -> Member:
    return replace(member, speed=1.0, draining=False, device="")
