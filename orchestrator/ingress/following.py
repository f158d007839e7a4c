"""Keeps a router's members up to date."""

from __future__ import annotations

import asyncio
import logging

from ...errors import ConcertinaError
from .members import MemberSource, Roster
from .router import Router

RETRY_S = 0.2

logger = logging.getLogger("concertina.ingress")


async def follow(router: Router, source: MemberSource) -> None:
    """Hand every list of members on to the router, until cancelled.

    A source that fails or ends is asked again; until it answers, the members stay as they are, because workers may well
    go on while whoever knows them restarts. For the same reason an empty roster changes nothing: workers that have
    ended are noticed by their connections.
    """
    level = logging.WARNING
    while True:
        try:
            async for roster in source():
                if roster != Roster():
                    router.update(roster.members, roster.awaited, roster.heirs)
                level = logging.WARNING
        except (OSError, ConcertinaError) as e:
            logger.log(level, "members are not known at the moment: %s", e)
            level = logging.DEBUG  # once is enough until it answers
        await asyncio.sleep(RETRY_S)
