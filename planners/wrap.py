"""First layouts for a target time in which the last devices share what is left, cut where a device is full.

Devices are filled as in `fill`, as long as whole replicas fill them well. What fits nowhere well is set aside for the
last devices: each is filled to the brim by cutting a unit, whose remainder goes to the next (the wrap-around rule of
McNaughton 1959). Only those few devices pay for further replicas.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass

import numpy as np

from .fields import FloatArray
from .fill import WORTH, fullest
from .layout import Layout
from .units import LayerProblem

CROWDED = 0.93
"""Part of the open slots taken by units in wait, above which devices take in small units: cutting needs free slots."""
Item = tuple[float, int]
"""Tokens without a device, and their unit."""


@dataclass(frozen=True, slots=True)
class Wrap:
    """What to fill to.

    Parameters
    ----------
    time_s : float
        Target time of the layer.
    waste : float
        Part of a device's room that may stay empty; a device that whole units fill less well is left for the end.
    """

    time_s: float
    waste: float


def wrapped(layer: LayerProblem, wrap: Wrap) -> Layout | None:
    """A layout near the target time, or None if slots run out; for plain layers."""
    work = _Wrapping(layer, wrap)
    for d in work.order:
        work.fill(d)
    work.cut()
    return with_rest(layer, work.given, work.items)


@dataclass(slots=True)
class _Device:
    """One device while it is filled; room and reading in tokens."""

    name: int
    room: float
    read: float
    slots: int


class _Wrapping:
    """Units in wait, fewest tokens first, and what devices have got."""

    def __init__(self, layer: LayerProblem, wrap: Wrap) -> None:
        self.layer = layer
        self.waste = wrap.waste
        self.time_s = wrap.time_s
        self.read_D: FloatArray = layer.read_UD[0] / layer.token_s_D
        room_D = (wrap.time_s - layer.base_D) / layer.token_s_D
        order = np.lexsort((layer.slots_D, -(room_D - self.read_D)))
        self.order = [int(d) for d in order if layer.slots_D[d] > 0]
        self.slots_left = int(layer.slots_D[self.order].sum())
        self.items: list[Item] = sorted((float(t), u) for u, t in enumerate(layer.tokens_U))
        self.aside: list[Item] = []
        self.later: list[int] = []
        self.given: list[tuple[int, int, float]] = []

    def _device(self, d: int, time_s: float) -> _Device:
        layer = self.layer
        room = float((time_s - layer.base_D[d]) / layer.token_s_D[d])
        return _Device(d, room, float(self.read_D[d]), int(layer.slots_D[d]))

    def _give(self, device: _Device, item: Item) -> None:
        self.given.append((item[1], device.name, item[0]))
        device.room -= device.read + item[0]
        device.slots -= 1

    def fill(self, d: int) -> None:
        """Give a device the largest unit in wait that whole companions complete well, or a full piece of one."""
        device = self._device(d, self.time_s)
        waiting = len(self.items) + len(self.aside)
        crowded = waiting > CROWDED * self.slots_left
        self.slots_left -= device.slots
        least = waiting - self.slots_left
        while self.items:
            lead = self.items.pop()
            if lead[0] > device.room - device.read:
                self._piece(device, lead, crowded)
                return
            chosen = self._companions(device, lead, least - 1, 0.0 if crowded else WORTH)
            if chosen is not None:
                self._give(device, lead)
                for k in sorted(chosen, reverse=True):
                    self._give(device, self.items.pop(k))
                return
            self.aside.append(lead)
        self.later.append(d)

    def _piece(self, device: _Device, lead: Item, crowded: bool) -> None:
        """As much of a unit as the device takes, beside the smallest unit where slots are scarce."""
        small = self.items[0] if self.items else lead
        beside = small[1] != lead[1] and small[0] + device.read <= 0.5 * device.room
        if crowded and device.slots > 1 and beside:
            self._give(device, self.items.pop(0))
        piece = device.room - device.read
        if piece <= 0.0:
            self.aside.append(lead)
            return
        self._give(device, (piece, lead[1]))
        insort(self.items, (lead[0] - piece, lead[1]))

    def _companions(self, device: _Device, lead: Item, least: int, worth: float) -> list[int] | None:
        """Up to three units beside the lead that leave little empty; None if too much stays empty."""
        tokens = np.array([t for t, _ in self.items])
        room = device.room - device.read - lead[0]
        best: list[int] | None = [] if least <= 0 else None
        empty = room if least <= 0 else np.inf
        for count in range(max(1, least), min(3, device.slots - 1, len(tokens)) + 1):
            chosen = fullest(tokens, room - count * device.read, count)
            if chosen is None or len({lead[1], *(self.items[k][1] for k in chosen)}) <= count:
                continue
            left = room - count * device.read - float(tokens[chosen].sum())
            if left < empty - worth * (device.room):
                best, empty = chosen, left
        return best if empty <= self.waste * device.room else None

    def cut(self) -> None:
        """Fill the devices left over to one level, cutting a unit wherever a device is full."""
        self.items = sorted(self.items + self.aside)
        if not self.later or not self.items:
            return
        level_s = self._level_s()
        carried: Item | None = None
        for at, d in enumerate(self.later):
            device = self._device(d, level_s)
            if carried is not None:
                carried = self._part(device, carried)
            if carried is None:
                carried = self._fill_and_cut(device, len(self.later) - at)
        if carried is not None:
            insort(self.items, carried)

    def _level_s(self) -> float:
        """Time at which the devices left over hold everything, with one cut on each but the last."""
        layer, later = self.layer, self.later
        weight = 1.0 / layer.token_s_D[later]
        replicas = len(self.items) + len(later) - 1
        need = sum(t for t, _ in self.items) + replicas * float(self.read_D[later].mean())
        return max(self.time_s, (need + float(layer.base_D[later] @ weight)) / float(weight.sum()))

    def _part(self, device: _Device, item: Item) -> Item | None:
        """Give the device what it can take of an item; returns the remainder."""
        part = min(item[0], device.room - device.read)
        if part <= 0.0:
            return item
        self._give(device, (part, item[1]))
        return (item[0] - part, item[1]) if part < item[0] else None

    def _fill_and_cut(self, device: _Device, devices_left: int) -> Item | None:
        """Whole units, the smallest, then the largest that fits; then part of the largest, whose rest is returned."""
        last = devices_left == 1
        whole = min(-(-len(self.items) // devices_left), device.slots if last else device.slots - 1)
        taken = {u for u, d, _ in self.given[-1:] if d == device.name}
        for _ in range(whole - 1):
            if self.items and self.items[0][0] + device.read <= device.room and self.items[0][1] not in taken:
                taken.add(self.items[0][1])
                self._give(device, self.items.pop(0))
        fit = bisect_right(self.items, (device.room - device.read, self.layer.units))
        if whole > 0 and device.slots > 1 and fit and self.items[fit - 1][1] not in taken:
            taken.add(self.items[fit - 1][1])
            self._give(device, self.items.pop(fit - 1))
        if device.slots > 0 and self.items and self.items[-1][1] not in taken:
            lead = self.items.pop()
            rest = self._part(device, lead)
            if rest == lead:
                insort(self.items, lead)
                return None
            return rest
        return None


def with_rest(layer: LayerProblem, given: list[tuple[int, int, float]], rest: list[Item]) -> Layout | None:
    """Pieces (unit, device, tokens), and whatever found no place where it finishes first, the largest first.

    None if slots run out; for plain layers.
    """
    unit, device, tokens = (list(column) for column in zip(*given, strict=True))
    work_D = np.bincount(device, weights=tokens, minlength=layer.devices) * layer.token_s_D
    count_D = np.bincount(device, minlength=layer.devices)
    time_D = layer.base_D + work_D + count_D * layer.read_UD[0]
    has_UD = np.zeros((layer.units, layer.devices), dtype=np.bool_)
    has_UD[unit, device] = True
    for t, u in sorted(rest, reverse=True):
        then_D = time_D + t * layer.token_s_D + layer.read_UD[u]
        then_D[(count_D >= layer.slots_D) | has_UD[u]] = np.inf
        d = int(then_D.argmin())
        if not np.isfinite(then_D[d]):
            return None
        time_D[d], has_UD[u, d] = then_D[d], True
        count_D[d] += 1
        unit.append(u)
        device.append(d)
        tokens.append(t)
    return Layout(np.array(unit), np.array(device), np.array(tokens))
