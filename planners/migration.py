"""From one placement to another: the problem, the ordered answer, and its predicted time.

A migration is a list of *phases*. Within a phase all moves run at the same time, into memory that is free when it
begins; then the phase's new replicas begin to serve, and only then are its frees carried out. So no expert that was
served is unserved at any moment, and no device exceeds its memory. (Where all that comes fits beside all that
goes there is one phase.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import OperatorError
from .cluster import Cluster
from .fields import finite, positive
from .model import ModelSpec
from .placement import Placement

Key = tuple[int, int]  # (layer, expert)


@dataclass(frozen=True, slots=True, order=True)
class Move:
    """Copy one expert's weights; ``source`` None reads them from the checkpoint."""

    layer: int
    expert: int
    source: str | None
    target: str
    bytes: float


@dataclass(frozen=True, slots=True, order=True)
class Free:
    """Give back the memory of a replica."""

    layer: int
    expert: int
    device: str
    bytes: float


@dataclass(frozen=True, slots=True)
class Phase:
    """Moves that run together, then frees; ``seconds`` is the predicted time of the moves."""

    moves: tuple[Move, ...]
    frees: tuple[Free, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Transport:
    """What moving costs in time beside the cluster's links.

    Parameters
    ----------
    checkpoint_bytes_s : float
        Rate at which one device reads the checkpoint.
    phase_s : float
        Fixed time of a phase (agreeing on the new replicas, at a step boundary).
    """

    checkpoint_bytes_s: float = 2e9
    phase_s: float = 0.0

    def __post_init__(self) -> None:
        positive("transport: checkpoint_bytes_s", self.checkpoint_bytes_s)
        finite("transport: phase_s", self.phase_s)


@dataclass(frozen=True, eq=False)
class MigrationProblem:
    """From ``old`` to ``new``.

    Parameters
    ----------
    cluster : Cluster
        Every device that lives: those of ``new``, and those of ``old`` that may still be read from. A device of
        ``old`` that is not in it is dead; what only it held comes from the checkpoint.
    model : ModelSpec
        Weighs the experts.
    old, new : Placement
    reserve_bytes : int
        Memory kept free of experts on every device.
    transport : Transport

    Raises
    ------
    OperatorError
        The placements do not fit each other, the model or the cluster.
    """

    cluster: Cluster
    model: ModelSpec
    old: Placement
    new: Placement
    reserve_bytes: int = 0
    transport: Transport = field(default_factory=Transport)

    def __post_init__(self) -> None:
        finite("migration: reserve_bytes", self.reserve_bytes)
        expected = (self.model.layers, self.model.experts)
        for name, placement in (("old", self.old), ("new", self.new)):
            if (placement.layers, placement.experts) != expected:
                raise OperatorError(
                    f"migration: {name}: {placement.layers} layers of {placement.experts} experts; "
                    f"expected {expected[0]} of {expected[1]}"
                )
        unknown = [d for d in self.new.devices if d not in self.cluster.index]
        if unknown:
            raise OperatorError(f"migration: new: devices {unknown} are not in the cluster")

    @cached_property
    def limit_bytes(self) -> dict[str, float]:
        """Memory for routed experts, by device."""
        taken = self.reserve_bytes + self.model.shared_bytes * self.model.layers
        return {d.name: max(0.0, d.memory_bytes - taken) for d in self.cluster.devices}

    @cached_property
    def start(self) -> dict[str, frozenset[Key]]:
        """(layer, expert) that each live device holds now."""
        return self._held(self.old)

    @cached_property
    def goal(self) -> dict[str, frozenset[Key]]:
        """(layer, expert) that each live device shall hold."""
        return self._held(self.new)

    def _held(self, placement: Placement) -> dict[str, frozenset[Key]]:
        held: dict[str, set[Key]] = {name: set() for name in self.cluster.names}
        for layer, devices in enumerate(placement.experts_LD):
            for name, experts in zip(placement.devices, devices, strict=True):
                if name in held:
                    held[name].update((layer, e) for e in experts)
        return {name: frozenset(keys) for name, keys in held.items()}

    @cached_property
    def _bytes_LE(self) -> list[list[float]]:
        rows: list[list[float]] = self.model.bytes_LE.tolist()
        return rows

    def weight(self, key: Key) -> float:
        return self._bytes_LE[key[0]][key[1]]

    def weights(self, keys: Iterable[Key]) -> float:
        return sum(self.weight(k) for k in keys)


@dataclass(frozen=True)
class Migration:
    """An ordered way from one placement to another.

    Parameters
    ----------
    placement : Placement
        The new placement; replicas that stay keep their slot where slots stay dense.
    phases : tuple of Phase
    peak_bytes : dict
        Most bytes of routed experts on each device at any moment.
    detour_bytes : float
        Part of `moved_bytes` copied only because memory was too tight for direct moves.
    """

    placement: Placement
    phases: tuple[Phase, ...]
    peak_bytes: dict[str, float]
    detour_bytes: float = 0.0

    @property
    def moves(self) -> tuple[Move, ...]:
        return tuple(m for phase in self.phases for m in phase.moves)

    @property
    def moved_bytes(self) -> float:
        return sum(m.bytes for m in self.moves)

    @property
    def checkpoint_bytes(self) -> float:
        return sum(m.bytes for m in self.moves if m.source is None)

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def incoming_bytes(self) -> dict[str, float]:
        """Bytes copied to each device."""
        into: dict[str, float] = defaultdict(float)
        for move in self.moves:
            into[move.target] += move.bytes
        return dict(into)


class LinkLoads:
    """Bytes over every device's links within one phase: out and in, within the node and between nodes, checkpoint."""

    def __init__(self, problem: MigrationProblem) -> None:
        self._cluster = problem.cluster
        self._transport = problem.transport
        self._busy_s: dict[tuple[str, str], float] = defaultdict(float)

    def _uses(self, source: str | None, target: str, size: float) -> list[tuple[tuple[str, str], float]]:
        if source is None:
            return [((target, "checkpoint"), size / self._transport.checkpoint_bytes_s)]
        devices, index, links = self._cluster.devices, self._cluster.index, self._cluster.links
        near = devices[index[source]].node == devices[index[target]].node
        rate, name = (links.node_bytes_s, "node") if near else (links.cluster_bytes_s, "cluster")
        return [((source, f"{name} out"), size / rate), ((target, f"{name} in"), size / rate)]

    def after(self, source: str | None, target: str, size: float) -> tuple[float, float]:
        """When this move would end, were it added; and the time it takes by itself."""
        uses = self._uses(source, target, size)
        return max(self._busy_s[link] + s for link, s in uses), max(s for _, s in uses)

    def add(self, source: str | None, target: str, size: float) -> None:
        for link, seconds in self._uses(source, target, size):
            self._busy_s[link] += seconds

    def seconds(self) -> float:
        """Time until the busiest link is done."""
        return max(self._busy_s.values(), default=0.0)
