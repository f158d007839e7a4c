"""One transition as a series of pictures of the deployment: requests, phases, throughput, pages by purpose."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field

from .elasticity_cases import Session
from .elasticity_deployment import LIMIT_S
from .elasticity_measures import median_token_s

_EVERY_S = 0.04
_BEFORE_S, _AFTER_S = 0.8, 1.0
_AFTER_STEPS = 10


@dataclass
class Timeline:
    """What happened, in seconds since the operation was asked for.

    ``phases`` are (from, words), ``pages`` (at, bytes by purpose), ``running`` (at, requests by device), ``arrivals``
    (at, tokens). ``step_s`` is the median time between two tokens of a client before.
    """

    title: str
    begin_s: float
    end_s: float
    step_s: float = 0.0
    committed_s: float = 0.0
    ended_s: float = 0.0
    phases: list[tuple[float, str]] = field(default_factory=list)
    pages: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    running: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)


async def record(session: Session, workers: int) -> Timeline:
    """Scale once and look at everything meanwhile, which costs throughput: measure on other runs."""
    before = len((await session.running.status()).workers)
    steady = await session.steady(before)
    timeline = Timeline(f"{before} to {workers} workers, {session.running.config.memory_mode} memory", 0.0, 0.0)
    timeline.step_s = median_token_s(session.load.arrivals, steady)
    pages: list[tuple[float, dict[str, int]]] = []
    running: list[tuple[float, dict[str, int]]] = []
    watching = asyncio.gather(_watch_pages(session, pages), _watch_requests(session, running))
    try:
        await asyncio.sleep(_BEFORE_S)
        asked_s = time.monotonic()
        operation = await session.running.ask(workers)
        phases = [(asked_s, "planning")]
        async with asyncio.timeout(LIMIT_S):
            while operation.state == "running":
                operation = await session.running.operation(operation.id)
                words = _words(operation.phase)
                if words not in ("", phases[-1][1]):
                    phases.append((time.monotonic(), words))
                await asyncio.sleep(_EVERY_S / 4)
        answer = session.running.answer(operation, asked_s)
        timeline.committed_s, timeline.ended_s = answer.committed_s - asked_s, answer.ended_s - asked_s
        await asyncio.sleep(max(_AFTER_S, _AFTER_STEPS * timeline.step_s))
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    timeline.begin_s, timeline.end_s = -_BEFORE_S, time.monotonic() - asked_s
    timeline.phases = [(at_s - asked_s, phase) for at_s, phase in phases]
    timeline.pages = [(at_s - asked_s, given) for at_s, given in pages]
    timeline.running = [(at_s - asked_s, requests) for at_s, requests in running]
    arrivals = ((at_s - asked_s, tokens) for at_s, _, tokens in session.load.arrivals)
    timeline.arrivals = [(at_s, tokens) for at_s, tokens in arrivals if timeline.begin_s <= at_s <= timeline.end_s]
    return timeline


def _words(phase: str) -> str:
    """``generation 2: switching`` without the generation; empty while the operation has not begun."""
    return phase if phase == "clearing up" else phase.partition(": ")[2]


async def _watch_pages(session: Session, looks: list[tuple[float, dict[str, int]]]) -> None:
    while True:
        status = await session.running.status()
        given: dict[str, int] = {}
        for pool in status.pools:
            for purpose, pages in pool.by_purpose.items():
                given[purpose] = given.get(purpose, 0) + pages * pool.page_bytes
        looks.append((time.monotonic(), given))
        await asyncio.sleep(_EVERY_S)


async def _watch_requests(session: Session, looks: list[tuple[float, dict[str, int]]]) -> None:
    """As the router knows them."""
    while True:
        by_device: dict[str, int] = {}
        for lane in session.load.router.lanes:
            by_device[lane.member.device] = by_device.get(lane.member.device, 0) + lane.sequences
        looks.append((time.monotonic(), by_device))
        await asyncio.sleep(_EVERY_S / 4)
