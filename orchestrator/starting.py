"""Waiting for a process that starts: one that hangs before anybody can ask it anything is ended. Knows no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from ..errors import InternalError, OperatorError
from .hands import Hands

_LOOKS = 10  # at whether there is a process, within the time that it has
_PATIENCE = 5  # times as long is waited for the cluster to have one


async def started(hands: Hands, what: str, name: str, limit_s: float, answering: Coroutine[None, None, None]) -> None:
    """Return when ``answering``, which starts a process and has its first answers, does; raises what it raises.

    Only the time for which there is a process counts; one that the cluster has no room for yet is waited for, five
    times as long.

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
    OperatorError
        The cluster has no process to give.
    """
    asking = asyncio.ensure_future(answering)
    looks = waits = 0
    try:
        while looks < _LOOKS and waits < _PATIENCE * _LOOKS:
            await asyncio.wait({asking}, timeout=limit_s / _LOOKS)
            if asking.done():
                return asking.result()
            if await hands.begun(name):
                looks += 1
            else:
                waits += 1
    finally:
        asking.cancel()
    why = f"{what} was started and gave no answer for {limit_s:g} s"
    if looks < _LOOKS:
        why = f"cluster: no process came for {what} in {_PATIENCE * limit_s:g} s"
    try:
        await hands.kill(name)
    except InternalError as e:
        raise InternalError(f"{why}; it cannot be ended: {e}") from e
    if looks < _LOOKS:
        raise OperatorError(f"{why}; look at its node's logs of Ray")
    raise InternalError(f"{why}; it was killed")
