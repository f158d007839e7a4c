"""Where every expert's replicas are, as one immutable value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from ..errors import OperatorError


@dataclass(frozen=True, slots=True, order=True)
class Replica:
    """One physical expert: a copy of a logical expert on a device.

    Parameters
    ----------
    device : int
        Index into `Placement.devices`.
    slot : int
        Position among this layer's physical experts on that device, dense from 0.
    share : float
        Part of the logical expert's tokens that this replica serves, in (0, 1].
    """

    device: int
    slot: int
    share: float = 1.0


@dataclass(frozen=True)
class Placement:
    """Replicas of every logical expert of every MoE layer.

    Parameters
    ----------
    devices : tuple of str
        Device names; a device may hold no expert at all.
    replicas_LE : tuple
        ``replicas_LE[layer][expert]`` is a non-empty tuple of `Replica`. Layers count MoE layers only.

    Raises
    ------
    OperatorError
        An expert without replica, two replicas of one expert on one device, slots that are not dense from 0,
        an unknown device, or shares that do not sum to 1.
    """

    devices: tuple[str, ...]
    replicas_LE: tuple[tuple[tuple[Replica, ...], ...], ...]

    def __post_init__(self) -> None:
        if len(set(self.devices)) != len(self.devices):
            raise OperatorError(f"placement: devices: names repeat: {self.devices}")
        for layer, experts in enumerate(self.replicas_LE):
            for expert, replicas in enumerate(experts):
                self._check_expert(f"placement: layer {layer}, expert {expert}", replicas)
            self._check_slots(layer)

    def __getstate__(self) -> tuple[Any, ...]:
        """In columns: of thousands of small objects pickle takes ten times as long."""
        counts_LE = [[len(replicas) for replicas in experts] for experts in self.replicas_LE]
        every = [r for experts in self.replicas_LE for replicas in experts for r in replicas]
        return self.devices, counts_LE, [r.device for r in every], [r.slot for r in every], [r.share for r in every]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        devices, counts_LE, *columns = state
        every = map(Replica, *columns)
        layers = tuple(tuple(tuple(islice(every, count)) for count in counts_E) for counts_E in counts_LE)
        self.__dict__.update(devices=devices, replicas_LE=layers)

    def _check_expert(self, where: str, replicas: Sequence[Replica]) -> None:
        if not replicas:
            raise OperatorError(f"{where}: no replica; every expert needs at least one")
        on = [r.device for r in replicas]
        if any(not 0 <= d < len(self.devices) for d in on):
            raise OperatorError(f"{where}: device index {on} outside 0..{len(self.devices) - 1}")
        if len(set(on)) != len(on):
            raise OperatorError(f"{where}: two replicas on one device: {on}")
        total = sum(r.share for r in replicas)
        if any(not 0 < r.share <= 1 for r in replicas) or not math.isclose(total, 1, abs_tol=1e-6):
            raise OperatorError(f"{where}: shares {[r.share for r in replicas]} must be in (0, 1] and sum to 1")

    def _check_slots(self, layer: int) -> None:
        for device, experts in enumerate(self.experts_LD[layer]):
            if -1 in experts:
                raise OperatorError(
                    f"placement: layer {layer}, device {self.devices[device]!r}: slots are not dense from 0"
                )

    @cached_property
    def experts_LD(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """``experts_LD[layer][device]``: logical experts by slot (-1 marks a gap, which validation refuses)."""
        layers = []
        for experts in self.replicas_LE:
            slots: list[dict[int, int]] = [{} for _ in self.devices]
            for expert, replicas in enumerate(experts):
                for r in replicas:
                    slots[r.device][r.slot] = expert
            layers.append(tuple(tuple(s.get(i, -1) for i in range(len(s))) for s in slots))
        return tuple(layers)

    @property
    def layers(self) -> int:
        return len(self.replicas_LE)

    @property
    def experts(self) -> int:
        return len(self.replicas_LE[0]) if self.replicas_LE else 0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; `from_dict` reads it back unchanged."""
        return {
            "devices": list(self.devices),
            "layers": [
                [[{"device": r.device, "slot": r.slot, "share": r.share} for r in replicas] for replicas in experts]
                for experts in self.replicas_LE
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "placement") -> Placement:
        """Read what `to_dict` wrote.

        Raises
        ------
        OperatorError
            A field is missing or malformed; the message begins with ``source`` and the field's path.
        """
        try:
            layers = tuple(
                tuple(
                    tuple(Replica(int(r["device"]), int(r["slot"]), float(r.get("share", 1.0))) for r in replicas)
                    for replicas in experts
                )
                for experts in data["layers"]
            )
            return cls(tuple(str(d) for d in data["devices"]), layers)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise OperatorError(
                f"{source}: expected {{devices: [name], layers: [[[{{device, slot, share}}]]]}}; got {e!r}"
            ) from e


def balanced_placement(devices: Sequence[str], layers: int, experts: int) -> Placement:
    """One replica of each expert, counts per device and layer differing by at most one.

    The devices that take one more expert rotate from layer to layer, so that the totals differ by at most one too.
    """
    if not devices:
        raise OperatorError("placement: devices: expected at least one")
    n = len(devices)
    small, extra = divmod(experts, n)
    plan = []
    for layer in range(layers):
        first = layer * extra % n
        sizes = [small + ((d - first) % n < extra) for d in range(n)]
        owners = [Replica(d, slot) for d, size in enumerate(sizes) for slot in range(size)]
        plan.append(tuple((r,) for r in owners))
    return Placement(tuple(devices), tuple(plan))
