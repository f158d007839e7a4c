"""Devices and the links between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .fields import FloatArray, IntArray, fail, finite, positive


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or CPU socket) that may hold experts.

    Parameters
    ----------
    name : str
        Unique within the cluster.
    kind : str
        For instance ``cpu`` or ``h200``; informative.
    memory_bytes : int
        Memory for experts, shared ones included.
    flops : float
        Rate at which it computes experts, floating-point operations per second.
    bandwidth_bytes_s : float
        Rate at which it reads weights.
    node : str
        Devices of one node fail together and talk over the faster link.
    """

    name: str
    kind: str
    memory_bytes: int
    flops: float
    bandwidth_bytes_s: float
    node: str = "node0"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            fail("device: name", self.name, "a non-empty string")
        where = f"device {self.name!r}"
        finite(f"{where}: memory_bytes", self.memory_bytes)
        positive(f"{where}: flops", self.flops)
        positive(f"{where}: bandwidth_bytes_s", self.bandwidth_bytes_s)


@dataclass(frozen=True, slots=True)
class Links:
    """Bandwidth of each device's links: to devices of its node, and to other nodes; bytes per second."""

    node_bytes_s: float = 400e9
    cluster_bytes_s: float = 50e9

    def __post_init__(self) -> None:
        positive("links: node_bytes_s", self.node_bytes_s)
        positive("links: cluster_bytes_s", self.cluster_bytes_s)
        if self.cluster_bytes_s > self.node_bytes_s:
            fail("links: cluster_bytes_s", self.cluster_bytes_s, f"<= node_bytes_s ({self.node_bytes_s:g})")


@dataclass(frozen=True)
class Cluster:
    """Devices in the order of `Placement.devices`, and their links."""

    devices: tuple[Device, ...]
    links: Links = field(default_factory=Links)

    def __post_init__(self) -> None:
        if not self.devices:
            fail("cluster: devices", self.devices, "at least one")
        if len(self.index) != len(self.devices):
            fail("cluster: devices", self.names, "names that do not repeat")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.devices)

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each device by name."""
        return {d.name: i for i, d in enumerate(self.devices)}

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes, in order of first appearance."""
        return tuple(dict.fromkeys(d.node for d in self.devices))

    @cached_property
    def node_D(self) -> IntArray:
        """Index into `nodes` of every device."""
        return np.array([self.nodes.index(d.node) for d in self.devices], dtype=np.int64)

    @cached_property
    def memory_bytes_D(self) -> FloatArray:
        return np.array([d.memory_bytes for d in self.devices], dtype=np.float64)

    @cached_property
    def flops_D(self) -> FloatArray:
        return np.array([d.flops for d in self.devices], dtype=np.float64)

    @cached_property
    def bandwidth_bytes_s_D(self) -> FloatArray:
        return np.array([d.bandwidth_bytes_s for d in self.devices], dtype=np.float64)
