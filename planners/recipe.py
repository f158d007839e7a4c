"""First layouts after the relaxation over all ways to fill a device (the other side of eq. 17).

The relaxation says which bundles of pieces devices of each kind hold, in fractions of devices, and how large units are
cut. Rounded along their sizes, these are slots. Pieces take slots of their rank; then the largest piece of every device
stays, and its companions are chosen to fill it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .fill import fullest
from .layout import Layout
from .price_program import Pieces, Priced
from .units import LayerProblem
from .wrap import with_rest

TRIES = ((0.5, None), (0.5, 0.002), (0.3, None), (0.3, 0.001), (0.7, None), (0.7, 0.003), (0.1, None), (0.9, None))
"""Where rounding begins, and the part of a device's room that companions may exceed it by; each makes a layout."""
Piece = tuple[float, int]
"""Size in lattice points, and unit."""


@dataclass(slots=True)
class _Device:
    """A device, room for tokens in lattice points, and pieces on it; ``wanted`` is how many are to be there."""

    name: int
    room: float
    wanted: int
    held: list[Piece]


def followed(layer: LayerProblem, priced: Priced, offset: float, above: float | None) -> Layout | None:
    """A layout like the relaxation's answer, or None if slots run out; for plain layers."""
    step = priced.trial.step
    devices, slots = list[_Device](), list[tuple[float, int, _Device]]()
    for kind, bundles in zip(priced.trial.kinds, priced.bundles, strict=True):
        for pieces, name in zip(rounded(bundles, kind.count, offset), kind.devices, strict=False):
            room = (kind.room * (1.0 + (above or 0.0)) - len(pieces) * kind.read) / step
            devices.append(_Device(name, room, len(pieces), []))
            slots += [(size, name, devices[-1]) for size in pieces]
    if not slots:
        return None
    rest = _by_rank(_pieces(priced), sorted(slots, key=lambda slot: (-slot[0], slot[1])))
    if above is not None:
        rest = _companions(devices, rest)
    given = [(unit, device.name, size * step) for device in devices for size, unit in device.held]
    return with_rest(layer, given, [(size * step, unit) for size, unit in rest])


def rounded(bundles: list[tuple[Pieces, float]], count: int, offset: float) -> list[Pieces]:
    """``count`` bundles, each kind of bundle within one of its part, and so for all runs of them by size."""
    total, done = sum(times for _, times in bundles), 0.0
    found: list[Pieces] = []
    for pieces, times in sorted(bundles, reverse=True):
        done += times * count / total
        found += [pieces] * (min(count, int(done + offset)) - len(found))
    return found


def _pieces(priced: Priced) -> list[Piece]:
    """Every unit, or what it is cut into; the largest first."""
    found = []
    for u, size in enumerate(priced.trial.size_U.tolist()):
        cut = priced.cuts.get(u, (size,))
        found += [(piece * size / sum(cut) if size > 0.0 else 0.0, u) for piece in cut]
    return sorted(found, key=lambda piece: (-piece[0], piece[1]))


def _by_rank(pieces: list[Piece], slots: list[tuple[float, int, _Device]]) -> list[Piece]:
    """Every piece to the largest slot left, unless its unit is on that device; returns pieces without a slot."""
    rest, left = [], [device for _, _, device in slots]
    for size, unit in pieces:
        at = next((i for i, device in enumerate(left) if all(u != unit for _, u in device.held)), -1)
        if at < 0:
            rest.append((size, unit))
        else:
            left.pop(at).held.append((size, unit))
    return rest


def _companions(devices: list[_Device], rest: list[Piece]) -> list[Piece]:
    """Choose again what goes beside the largest piece of every device: pairs first; returns pieces left over."""
    pool = sorted([*rest, *(piece for device in devices for piece in device.held[1:])])
    for device in devices:
        del device.held[1:]
    for device in sorted(devices, key=lambda d: (d.wanted, [-size for size, _ in d.held])):
        count = min(device.wanted - len(device.held), 3, len(pool))
        if count < 1 or not device.held:
            continue
        room = device.room - device.held[0][0]
        chosen = fullest(np.array([size for size, _ in pool]), room, count) or list(range(count))
        units = {device.held[0][1], *(pool[k][1] for k in chosen)}
        if len(units) > len(chosen):
            device.held += [pool[k] for k in chosen]
            for k in sorted(chosen, reverse=True):
                pool.pop(k)
    return pool
