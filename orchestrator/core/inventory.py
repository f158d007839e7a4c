"""The devices that a deployment may have: their names, kinds and, where it is said, nodes. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import count


@dataclass(frozen=True, slots=True)
class Kind:
    """What planners know of a device. Among CPU workers only the ratios matter.

    Parameters
    ----------
    name : str
    flops, bandwidth_bytes_s : float
        Rates at which it computes experts and reads weights.
    memory_part : float
        Its memory, as a part of that of the largest kind.
    """

    name: str = "cpu"
    flops: float = 5e10
    bandwidth_bytes_s: float = 1e10
    memory_part: float = 1.0


CPU = Kind()


@dataclass(frozen=True, slots=True)
class Entry:
    """One device; ``node`` is the id or address of the node that it must be on, empty for any."""

    device: str
    kind: Kind = CPU
    node: str = ""


@dataclass(frozen=True, slots=True)
class Inventory:
    """All devices there may be, in the order in which they are taken; empty: ``cpu-0``, ``cpu-1``, ... without end."""

    entries: tuple[Entry, ...] = field(default=())

    def free(self, taken: Collection[str]) -> Iterator[Entry]:
        """Those that have no seat yet."""
        every = iter(self.entries) if self.entries else map(Entry, map("cpu-{}".format, count()))
        return (entry for entry in every if entry.device not in taken)

    def turn(self, device: str) -> int:
        """When a device is taken: that with the highest turn is given up first."""
        if self.entries:
            return next((i for i, entry in enumerate(self.entries) if entry.device == device), len(self.entries))
        match = re.search(r"(\d+)$", device)
        return int(match[1]) if match else -1


ALIKE = Inventory()
