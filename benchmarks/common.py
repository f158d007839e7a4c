"""What every benchmark reports: the machine, and one JSON layout.

Run benchmarks from the repository's root: ``python -m benchmarks.NAME --json FILE``.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "pulp", "ray", "torch", "transformers")


def machine_facts() -> dict[str, Any]:
    """What a reader needs to judge the numbers: processor, cores that this process may use, memory, load, versions."""
    return {
        "cpu": _proc_field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def write_report(
    path: str | Path | None, name: str, summary: Mapping[str, Any], details: Sequence[Mapping[str, Any]]
) -> None:
    """Write one benchmark's results as JSON; nothing if ``path`` is None.

    Parameters
    ----------
    path : str, Path or None
        File to write; its folder is made.
    name : str
        The benchmark.
    summary : mapping
        A few numbers that answer what the benchmark asks.
    details : sequence of mappings
        Everything that was measured, one mapping per case, with units in the keys.
    """
    if path is None:
        return
    report = {
        "benchmark": name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "summary": dict(summary),
        "details": [dict(d) for d in details],
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


def percentile(values: Sequence[float], q: float) -> float:
    """The ``q`` quantile (0 to 1) by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def _proc_field(path: str, field: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
