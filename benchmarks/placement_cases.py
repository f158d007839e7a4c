"""Instances of the placement benchmark: generated skewed loads, fleets, and real routing where it is present."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from concertina.planners.cluster import Cluster, Device
from concertina.planners.fields import FloatArray
from concertina.planners.model import Loads, ModelSpec
from concertina.planners.problem import PlacementProblem

ROUTING = Path(__file__).resolve().parents[2] / "shared" / "data" / "routing" / "olmoe_mixtral_routing.json"
FLEETS = (False, True)
SOME_LAYERS = 8
"""Of a large instance's layers, where only a few are planned; time limits shrink with them."""
SIGMA = 0.8
"""Standard deviation of the logarithm of expert loads; OLMoE's layers lie between 0.3 and 1.8."""
EXPERT_BYTES = 44e6  # DeepSeek-V3's experts in 8 bits: 3 x 7168 x 2048
EXPERT_FLOPS = 88e6
FAST = {"kind": "fast", "memory_bytes": 10**13, "flops": 400e12, "bandwidth_bytes_s": 3.3e12}
SLOW = {"kind": "slow", "memory_bytes": 10**13, "flops": 160e12, "bandwidth_bytes_s": 1.6e12}


@dataclass(frozen=True, slots=True)
class Case:
    """One generated instance; ``tokens`` per step and expert on average, ``spare`` slots beyond one per expert."""

    experts: int
    layers: int
    devices: int
    spare: int
    mixed: bool
    tokens: float = 2048.0

    @property
    def name(self) -> str:
        fleet = "mixed" if self.mixed else "equal"
        kind = "decode" if self.tokens < 256 else "prefill"
        return f"{self.experts}x{self.layers} on {self.devices} {fleet}, {self.spare} spare, {kind}"

    @property
    def slots(self) -> int:
        """Per device and layer, as EPLB needs: equally many everywhere."""
        return -(-(self.experts + self.spare) // self.devices)


def cluster(devices: int, mixed: bool, large: bool | None = None) -> Cluster:
    """Nodes of eight; of a mixed fleet every third node (of fleets that are not large, device) is slow."""
    block = 8 if (devices >= 24 if large is None else large) else 1
    kinds = [SLOW if mixed and (i // block) % 3 == 2 else FAST for i in range(devices)]
    made: list[Device] = []
    for i, kind in enumerate(kinds):
        numbers: dict[str, Any] = dict(kind)
        made.append(Device(name=f"d{i}", node=f"n{i // 8}", **numbers))
    return Cluster(tuple(made))


def survivors(before: int, after: int, mixed: bool) -> Cluster:
    """``after`` devices where there were ``before``: more of them, or those left when the last are lost.

    Of a mixed fleet every so-manyth is lost instead, so that both kinds are.
    """
    if after >= before or not mixed:
        return cluster(after, mixed, before >= 24)
    devices = cluster(before, mixed).devices
    return Cluster(tuple(devices[i * before // after] for i in range(after)))


def skewed(experts: int, layers: int, tokens: float, seed: int = 0) -> FloatArray:
    """Log-normal loads with mean ``tokens``, shape (L, E)."""
    loads_LE = np.random.default_rng(seed).lognormal(0.0, SIGMA, (layers, experts))
    scaled_LE: FloatArray = loads_LE / loads_LE.mean(axis=1, keepdims=True) * tokens
    return scaled_LE


def problem(case: Case, seed: int = 0) -> PlacementProblem:
    model = ModelSpec(case.layers, case.experts, EXPERT_BYTES, EXPERT_FLOPS)
    loads = Loads(skewed(case.experts, case.layers, case.tokens, seed))
    return PlacementProblem(cluster(case.devices, case.mixed), model, loads, slots=case.slots)


def cases(quick: bool) -> list[Case]:
    """The grid, or a few small ones."""
    if quick:
        return [
            Case(8, 2, 8, 8, False),
            Case(64, 4, 8, 32, False),
            Case(64, 4, 8, 32, True),
            Case(256, 4, 32, 32, False),
            Case(256, 4, 32, 32, True),
            Case(256, 4, 32, 0, True, tokens=64.0),
        ]
    sizes = {(8, 32): (8,), (64, 16): (8, 32), (128, 48): (16, 64), (256, 58): (32, 64, 128, 320)}
    grid = [(e, layers, d) for (e, layers), devices in sizes.items() for d in devices]
    found = [Case(e, _part(e, layers, d, s), d, s, m) for e, layers, d in grid for s in (0, 32, 64) for m in FLEETS]
    found += [Case(e, layers, d, 32 if d <= e else 64, m, 64.0) for e, layers, d in grid for m in FLEETS]
    return [c for c in found if c.devices <= c.experts + c.spare]


def _part(experts: int, layers: int, devices: int, spare: int) -> int:
    """Layers to plan: all with the spare slots that aims are stated for, a few with others where there are many."""
    stated = spare == (32 if devices <= experts else 64)
    return layers if stated or experts < 256 else SOME_LAYERS


def routing(model: str) -> dict[str, FloatArray] | None:
    """Tokens per layer and expert of each domain; None where the data is not there.

    Source: allenai/OLMoE (Apache-2.0), three layers of OLMoE and Mixtral on four domains of text.
    """
    if not ROUTING.is_file():
        return None
    domains = json.loads(ROUTING.read_text())[model]["domains"]
    return {name: np.array(d["counts_LE"], dtype=np.float64) for name, d in domains.items()}


def made_up_domains(experts: int = 64, layers: int = 3, count: int = 4, seed: int = 0) -> dict[str, FloatArray]:
    """Domains that share half of their (logarithmic) skew, where there is no real routing."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0.0, 1.0, (layers, experts))
    own = rng.normal(0.0, 1.0, (count, layers, experts))
    tables = np.exp(0.8 * (np.sqrt(0.5) * common + np.sqrt(0.5) * own)) * 1000
    return {f"made-up {i}": table for i, table in enumerate(tables)}
