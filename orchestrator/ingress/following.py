"""Keeps a router's members up to date."""

from __future__ import annotations

import asyncio
import logging

from ...errors import ConcertinaError
from .members import MemberSource
from .router import Router

RETRY_S = 1.0

logger = logging.getLogger("concertina.ingress")


async def follow(router: Router, source: MemberSource) -> None:
    """Hand every list of members on to the router, until cancelled.

    A source that fails or ends is asked again; until it answers, the members stay as they are, because workers may well
    go on while whoever knows them restarts.
    """
    while True:
        try:
            async for members in source():
                router.update(members)
        except (OSError, ConcertinaError) as e:
            logger.warning("members are not known at the moment: %s", e)
        await asyncio.sleep(RETRY_S)
