"""Which addresses answer now. Knows no Ray, which lists a node that has died as alive for many seconds."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from math import inf

Address = tuple[str, int]
_FRESH_S = 0.1  # an answer is taken for so long
_ANSWER_S = 0.5
_OUR_OWN = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENETDOWN, errno.ENETUNREACH)
_TRIES = 2  # of somebody who is silent; who refuses is not asked again
_PATIENCE_S = 0.02  # for all answers, before those missing are taken to be what they were


@dataclass(slots=True)
class _Door:
    opens: bool = True
    asked_s: float = -inf
    asking: asyncio.Task[None] | None = None


class Knocking:
    """Whether somebody listens at an address, asked again after a moment. Lives in one event loop."""

    def __init__(self) -> None:
        self._doors: dict[Address, _Door] = {}

    async def answering(self, addresses: Collection[Address]) -> frozenset[Address]:
        """Those that answer. Never waits for one that is silent: it counts as before, at first as one that answers."""
        self._doors = {address: self._doors.get(address) or _Door() for address in addresses}
        for address, door in self._doors.items():
            if door.asking is None and time.monotonic() - door.asked_s >= _FRESH_S:
                door.asking = asyncio.create_task(self._ask(address, door))
        asking = [door.asking for door in self._doors.values() if door.asking is not None]
        if asking:
            await asyncio.wait(asking, timeout=_PATIENCE_S)
        return frozenset(address for address, door in self._doors.items() if door.opens)

    def doubt(self) -> None:
        """Something on the way has failed: ask everybody anew the next time."""
        for door in self._doors.values():
            door.asked_s = -inf

    async def _ask(self, address: Address, door: _Door) -> None:
        door.asked_s = time.monotonic()
        opens = await _opens(address)
        if opens is not None:
            door.opens = opens
        door.asking = None


async def _opens(address: Address) -> bool | None:
    """None if this machine could not ask: that says nothing of the other one."""
    for _ in range(_TRIES):
        try:
            async with asyncio.timeout(_ANSWER_S):
                _, writer = await asyncio.open_connection(*address)
        except ConnectionRefusedError:
            return False
        except OSError as e:  # a time-out too: a packet may be lost
            if e.errno in _OUR_OWN:
                return None
            continue
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return True
    return False
