"""Waiting for a process that starts: one that hangs before anybody can ask it anything is ended. Knows no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from ..errors import InternalError
from .hands import Hands

_LOOKS = 10  # at whether there is a process, within the time that it has


async def started(hands: Hands, what: str, name: str, limit_s: float, answering: Coroutine[None, None, None]) -> None:
    """Return when ``answering``, which starts a process and has its first answers, does; raises what it raises.

    Only the time for which there is a process counts: one that the cluster has no room for yet is waited for.

    Parameters
    ----------
    hands : Hands
    what : str
        The process, for people; ``name`` is that for `Hands.kill`.
    limit_s : float

    Raises
    ------
    InternalError
        The process has given no answer for ``limit_s``; it has been killed.
    """
    asking = asyncio.ensure_future(answering)
    looks = 0
    try:
        while looks < _LOOKS:
            await asyncio.wait({asking}, timeout=limit_s / _LOOKS)
            if asking.done():
                return asking.result()
            looks += await hands.begun(name)
    finally:
        asking.cancel()
    why = f"{what} was started and gave no answer for {limit_s:g} s"
    try:
        await hands.kill(name)
    except InternalError as e:
        raise InternalError(f"{why}; it cannot be ended: {e}") from e
    raise InternalError(f"{why}; it was killed")
