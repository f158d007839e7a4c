"""What is measured: changes, the two other ways to another size, and kills. Each case gives a row."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from concertina.orchestrator.config import DeploymentConfig

from .elasticity_deployment import LIMIT_S, Answer, Running, moved_bytes
from .elasticity_load import Load
from .elasticity_measures import (
    Steps,
    Window,
    longest_quiet_s,
    longest_silence_s,
    median_step_s,
    pause,
    peak_bytes,
    spread_tokens_per_s,
    steady_bytes,
    tokens_per_s,
)
from .elasticity_memory import Sampler, actors

Row = dict[str, Any]
_LOOK_S = 0.2
_LATELY_S = 1.5
_AFTER_S = 0.5  # behind an operation's end, the next standby starts


@dataclass
class Session:
    """A deployment under load, and what watches it. The other ways to another size replace both.

    ``watch_s`` is how long a steady state is looked at; ``streams`` counts those of earlier loads.
    """

    running: Running
    load: Load
    sampler: Sampler
    clients: int
    vocabulary: int
    watch_s: float
    streams: Counter[str] = field(default_factory=Counter)

    @classmethod
    async def start(
        cls, config: DeploymentConfig, sampler: Sampler, clients: int, vocabulary: int, watch_s: float
    ) -> Session:
        """Start the deployment and its clients; returns when every client has had answers."""
        running = await Running.start(config)
        session = cls(running, Load(config, clients, vocabulary), sampler, clients, vocabulary, watch_s)
        try:
            await session.load.everyone(clients, LIMIT_S)
        except BaseException:
            await session.stop()
            raise
        return session

    async def stop(self) -> None:
        await self.end_load(self.load)
        await self.running.stop()

    async def end_load(self, load: Load) -> None:
        """Give its streams up, and count those that have ended."""
        await load.close()
        self.streams += Counter(finished=load.finished, failed=load.failed, changed=load.changed)

    async def steady(self, workers: int) -> Window:
        """Wait until nothing is under way, and watch for a while."""
        await self.running.settled(workers)
        while self.running.config.reserve_memory and self._reserving():
            await asyncio.sleep(_LOOK_S)
        begin_s = time.monotonic()
        await asyncio.sleep(self.watch_s)
        return Window(begin_s, time.monotonic())

    def _reserving(self) -> bool:
        """Whether pools have grown lately; where they keep their memory they stop when they have all."""
        now_s = time.monotonic()
        lately = {sample.pool_bytes for sample in self.sampler.between(now_s - _LATELY_S, now_s)}
        return len(lately) != 1


async def change(session: Session, workers: int) -> Row:
    """Scale the running deployment under load."""
    running, load = session.running, session.load
    before_workers = len((await running.status()).workers)
    preview = await running.preview(workers)
    before = await session.steady(before_workers)
    pools = await running.status()
    answer = await running.scale(workers)
    await asyncio.sleep(_AFTER_S)
    steps = await running.step_ends_s(before.begin_s)
    settled = await running.settled(workers)
    refilled_s = time.monotonic()
    after = await session.steady(workers)
    later_step_s = median_step_s(await running.step_ends_s(after.begin_s), after)
    await asyncio.sleep(2 * later_step_s)  # until tokens have come that were being made as the window ended
    return {
        "case": "change",
        "change": f"{before_workers}_to_{workers}",
        **_times(answer, refilled_s),
        "first_step_s": _first_step_s(steps, answer, later_step_s),
        **_pause(steps, answer, before, later_step_s),
        **_silence(load, answer, before),
        **_throughput(load, answer, before, after, refilled_s, workers > before_workers),
        **_sides_of_commit(load, answer, before, after),
        **_memory(session, answer, before, after),
        **moved_bytes(pools, settled),
        "dry_run_bytes": preview.moved_bytes,
        "dry_run_s": preview.seconds,
        "planned_bytes": answer.planned_bytes,
    }


def _times(answer: Answer, refilled_s: float) -> Row:
    return {
        "plan_s": answer.begun_s - answer.asked_s,
        "commit_s": answer.committed_s - answer.asked_s,
        "end_s": answer.ended_s - answer.asked_s,
        "standby_again_s": refilled_s - answer.asked_s,
    }


def _first_step_s(steps: Steps, answer: Answer, later_step_s: float) -> float:
    """From the request to the end of the new generation's first step: other ways are timed to their first token."""
    own_s = answer.committed_s + later_step_s / 2  # the step before ended just before the commit was noted
    return min(end_s for ends_s in steps for end_s in ends_s if end_s > own_s) - answer.asked_s


def _pause(steps: Steps, answer: Answer, before: Window, later_step_s: float) -> Row:
    """Beside it the same of as long a time before, in which nothing happened: what the machine's noise makes."""
    during, control = _windows(answer, before)
    step_s = median_step_s(steps, before)
    seen = pause(steps, during, step_s, later_step_s, answer.committed_s)
    starting = Window(answer.ended_s, answer.ended_s + _AFTER_S)
    later = pause(steps, starting, step_s, later_step_s, answer.committed_s)
    usual = pause(steps, control, step_s, step_s, answer.asked_s)
    return {
        "step_ms": step_s * 1e3,
        "later_step_ms": later_step_s * 1e3,
        "pause_ms": seen.seconds * 1e3,
        "pause_steps": seen.steps,
        "pause_behind_commit_s": seen.at_s - answer.committed_s,
        "control_pause_ms": usual.seconds * 1e3,
        "control_pause_steps": usual.steps,
        "standby_pause_ms": later.seconds * 1e3,
        "standby_pause_steps": later.steps,
    }


def _silence(load: Load, answer: Answer, before: Window) -> Row:
    """What the clients saw of it."""
    during, control = _windows(answer, before)
    return {
        "quiet_ms": longest_quiet_s(load.arrivals, during) * 1e3,
        "control_quiet_ms": longest_quiet_s(load.arrivals, control) * 1e3,
        "client_silence_ms": longest_silence_s(load.arrivals, during) * 1e3,
        "control_client_silence_ms": longest_silence_s(load.arrivals, control) * 1e3,
    }


def _windows(answer: Answer, before: Window) -> tuple[Window, Window]:
    during = Window(answer.asked_s, answer.ended_s)
    return during, Window(max(before.begin_s, before.end_s - during.seconds), before.end_s)


def _throughput(load: Load, answer: Answer, before: Window, after: Window, refilled_s: float, grown: bool) -> Row:
    """During is from request to end. Expected is the steady rate before until the commit, the one after from then.

    Lost is the time that serving stood still, as it were: the tokens that are missing, by the expected rate. And the
    same for the time from the end until another standby has come where one was used, which is by the rate after.
    """
    during = Window(answer.asked_s, answer.ended_s)
    refill = Window(answer.ended_s, refilled_s)
    old, new, now = (spread_tokens_per_s(load.arrivals, window) for window in (before, after, during))
    committed_s = answer.committed_s - answer.asked_s
    expected = (old * committed_s + new * (during.seconds - committed_s)) / during.seconds
    while_it_starts = spread_tokens_per_s(load.arrivals, refill)
    return {
        "tokens_per_s_before": old,
        "tokens_per_s_during": now,
        "tokens_per_s_after": new,
        "tokens_per_s_standby_starting": while_it_starts,
        **({"standby_lost_ms": refill.seconds * (1 - while_it_starts / new) * 1e3} if grown else {}),
        "throughput_during_over_before": now / old,
        "throughput_during_over_expected": now / expected,
        "lost_ms": during.seconds * (1 - now / expected) * 1e3,
    }


def _sides_of_commit(load: Load, answer: Answer, before: Window, after: Window) -> Row:
    """What is prepared beside serving costs until the commit; the switch and what is cleared up, from then on."""
    sides = Window(answer.asked_s, answer.committed_s), Window(answer.committed_s, answer.ended_s)
    until, behind, old, new = (spread_tokens_per_s(load.arrivals, window) for window in (*sides, before, after))
    return {"throughput_until_commit_over_before": until / old, "throughput_from_commit_over_after": behind / new}


def _memory(session: Session, answer: Answer, before: Window, after: Window) -> Row:
    """Peak from request to end over the larger of the steady states before and after."""
    samples = session.sampler.between
    steady = [steady_bytes(samples(w.begin_s, w.end_s)) for w in (before, after)]
    total, pools = (max(part) for part in zip(*steady, strict=True))
    peak, pool_peak = peak_bytes(samples(answer.asked_s - 0.1, answer.ended_s + 0.1))
    return {
        "steady_bytes": total,
        "peak_bytes": peak,
        "peak_over_steady": peak / total,
        "pool_steady_bytes": pools,
        "pool_peak_bytes": pool_peak,
        "pool_peak_over_steady": pool_peak / pools,
    }


async def cold_restart(session: Session, workers: int) -> Row:
    """Stop the deployment and start it at the new size in the same Ray, until the first token."""
    before_workers = len((await session.running.status()).workers)
    begin_s = time.monotonic()
    await session.stop()
    config = session.running.anew(workers)
    session.running = await Running.start(config)
    session.load = Load(config, session.clients, session.vocabulary)
    first_s = await session.load.first_token_s(LIMIT_S)
    return {"case": "cold_restart", "change": f"{before_workers}_to_{workers}", "serving_s": first_s - begin_s}


async def second_copy(session: Session, workers: int) -> Row:
    """Start a second deployment of the new size beside the first, let clients go there, and stop the first."""
    old, old_load = session.running, session.load
    before_workers = len((await old.status()).workers)
    before = await session.steady(before_workers)
    begin_s = time.monotonic()
    config = old.anew(workers)
    session.running = await Running.start(config)
    session.load = Load(config, session.clients, session.vocabulary)
    first_s = await session.load.first_token_s(LIMIT_S)
    await old_load.drain(LIMIT_S)
    await session.end_load(old_load)
    await old.stop()
    end_s = time.monotonic()
    after = await session.steady(workers)
    samples = session.sampler.between
    steady = max(steady_bytes(samples(w.begin_s, w.end_s))[0] for w in (before, after))
    rates = [tokens_per_s(old_load.arrivals, window) for window in (before, Window(begin_s, first_s))]
    return {
        "case": "second_copy",
        "change": f"{before_workers}_to_{workers}",
        "serving_s": first_s - begin_s,
        "end_s": end_s - begin_s,
        "peak_over_steady": peak_bytes(samples(begin_s, end_s))[0] / steady,
        "throughput_during_over_before": rates[1] / rates[0],
    }


async def killed_worker(session: Session) -> Row:
    """SIGKILL to a worker that serves; a standby takes its place."""
    status = await session.running.status()
    return await _killed(session, "killed_worker", status.workers[-1].pid, status.generation)


async def killed_owner(session: Session) -> Row:
    """SIGKILL to a memory owner; another one adopts its pool."""
    owners = actors(os.getpid(), ["ray::OwnerActor"])
    return await _killed(session, "killed_owner", owners[0], 0)


async def _killed(session: Session, case: str, pid: int, generation: int) -> Row:
    running, load = session.running, session.load
    status = await running.status()
    workers = len(status.workers)
    before = await session.steady(workers)
    os.kill(pid, signal.SIGKILL)
    at_s = time.monotonic()
    await asyncio.sleep(_AFTER_S)
    await running.settled(workers, generation)
    after = Window(at_s, time.monotonic())
    return {
        "case": case,
        "change": f"of_{workers}",
        "silence_s": longest_silence_s(load.arrivals, after),
        "control_silence_s": longest_silence_s(load.arrivals, before),
        "quiet_s": longest_quiet_s(load.arrivals, after),
        "whole_again_s": after.seconds,
    }
