"""Shared memory beside gloo: the time and CPU of one exchange of 64 x 1024 bf16 per member.

``python -m benchmarks.exchange [--json FILE] [--quick]``. Both transports run in the same processes, in short
turns, so that the machine's noise meets both. CPU counts all threads of a member.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from concertina.workers.exchange.base import Exchange
from concertina.workers.exchange.group import GroupExchange, Rendezvous
from concertina.workers.exchange.layout import region_bytes
from concertina.workers.exchange.liveness import MemberLocks
from concertina.workers.exchange.shared import SharedMemoryExchange
from torch.distributed import TCPStore

from .common import percentile, write_report

TOKENS, HIDDEN = 64, 1024
CAPACITY = TOKENS * HIDDEN * 2
TURN = 25  # rounds before the other transport's turn
TIMEOUT_S = 60.0
Result = dict[str, dict[str, list[float]]]


def member(rank: int, size: int, rounds: int, where: dict[str, Any], answers: Any) -> None:
    """One process: times every call, in turns, and sends microseconds by transport and call."""
    torch.set_num_threads(1)
    fd = os.open(where["path"], os.O_RDWR)
    shared = SharedMemoryExchange(mmap.mmap(fd, 0), rank, size, CAPACITY, TIMEOUT_S, MemberLocks(fd, 0))
    gloo = GroupExchange(Rendezvous("127.0.0.1", where["port"], f"size{size}"), rank, size, TIMEOUT_S)
    result: Result = {}
    for turn in range(-1, -(-rounds // TURN)):  # the first turn warms up
        for name, exchange in (("shared", shared), ("gloo", gloo)):
            for call, run in calls(exchange).items():
                shared.all_gather([turn])
                times_us, cpu_us = timed(run)
                if turn >= 0:
                    into = result.setdefault(f"{name} {call}", {"wall_us": [], "cpu_us": []})
                    into["wall_us"] += times_us
                    into["cpu_us"].append(cpu_us)
    answers.put((rank, result))
    shared.all_gather([0])
    gloo.close()
    shared.close()


def calls(exchange: Exchange) -> dict[str, Callable[[], object]]:
    """The calls of one MoE layer and of one step, each checked against nothing: the tests do that."""
    splits = [TOKENS // exchange.size] * exchange.size
    x = torch.ones(sum(splits), HIDDEN, dtype=torch.bfloat16)
    return {
        "dispatch": lambda: exchange.dispatch(x, splits),
        "combine": lambda: exchange.combine(x, splits, splits),
        "all_gather": lambda: exchange.all_gather([1, 2, 3, 4]),
    }


def timed(run: Callable[[], object]) -> tuple[list[float], float]:
    """Wall microseconds of each of a turn's rounds, and CPU microseconds of a round on average."""
    times_us = []
    cpu = time.process_time_ns()
    for _ in range(TURN):
        began = time.perf_counter_ns()
        run()
        times_us.append((time.perf_counter_ns() - began) / 1e3)
    return times_us, (time.process_time_ns() - cpu) / 1e3 / TURN


def measure(size: int, rounds: int, port: int) -> list[Result]:
    """Results of every member of an exchange of ``size``."""
    fd = os.memfd_create("exchange-benchmark")
    os.ftruncate(fd, region_bytes(size, CAPACITY))
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    where = {"path": f"/proc/{os.getpid()}/fd/{fd}", "port": port}
    processes = [context.Process(target=member, args=(r, size, rounds, where, answers)) for r in range(size)]
    for p in processes:
        p.start()
    results = [answers.get(timeout=300)[1] for _ in processes]
    for p in processes:
        p.join()
    os.close(fd)
    return results


def rows_of(size: int, results: list[Result]) -> list[dict[str, Any]]:
    """One mapping per transport and call, over all members."""
    rows = []
    for key in results[0]:
        wall = [us for r in results for us in r[key]["wall_us"]]
        cpu = [us for r in results for us in r[key]["cpu_us"]]
        transport, call = key.split()
        rows.append(
            {
                "members": size,
                "transport": transport,
                "call": call,
                "min_us": round(min(wall), 1),
                "p50_us": round(percentile(wall, 0.5), 1),
                "p90_us": round(percentile(wall, 0.9), 1),
                "cpu_us_per_member": round(sum(cpu) / len(cpu), 1),
            }
        )
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times less time (p50, min) and CPU shared memory takes than gloo, by members and call."""
    by = {(r["members"], r["call"], r["transport"]): r for r in rows}
    out = {}
    for members, call, transport in by:
        if transport == "shared":
            ours, theirs = by[members, call, "shared"], by[members, call, "gloo"]
            for unit in ("p50_us", "min_us", "cpu_us_per_member"):
                name = f"{call}, {members} members: gloo / shared {unit.split('_us')[0]}"
                out[name] = round(theirs[unit] / ours[unit], 1)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, 2 and 3 members")
    args = parser.parse_args()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rows: list[dict[str, Any]] = []
    for size in (2, 3) if args.quick else (2, 3, 4):
        rows += rows_of(size, measure(size, 100 if args.quick else 1000, store.port))
    print(f"{'members':>7} {'transport':>9} {'call':>10} {'min us':>8} {'p50 us':>8} {'p90 us':>8} {'CPU us':>8}")
    for r in rows:
        print(
            f"{r['members']:>7} {r['transport']:>9} {r['call']:>10} {r['min_us']:>8} {r['p50_us']:>8} "
            f"{r['p90_us']:>8} {r['cpu_us_per_member']:>8}"
        )
    summary = ratios(rows)
    for name, ratio in summary.items():
        print(f"{name}: {ratio}")
    write_report(args.json, "exchange", summary, rows)


if __name__ == "__main__":
    main()
