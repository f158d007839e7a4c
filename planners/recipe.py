"""First layouts after the relaxation over all ways to fill a device (the other side of eq. 17).

The relaxation says which bundles of pieces devices of each kind hold, in fractions of devices, and how large units are
cut. Rounded along their sizes, these are slots of a size each; pieces take slots of their rank.
"""

from __future__ import annotations

from .layout import Layout
from .price_program import Pieces, Priced
from .units import LayerProblem
from .wrap import with_rest

OFFSETS = (0.5, 0.1, 0.3, 0.7, 0.9)
"""Where rounding begins; each makes another layout."""


def followed(layer: LayerProblem, priced: Priced, offset: float) -> Layout | None:
    """A layout like the relaxation's answer, or None if slots run out; for plain layers."""
    slots = [
        (size, device)
        for kind, bundles in zip(priced.trial.kinds, priced.bundles, strict=True)
        for pieces, device in zip(rounded(bundles, kind.count, offset), kind.devices, strict=False)
        for size in pieces
    ]
    pieces = _pieces(layer, priced)
    given, rest = _by_rank(pieces, sorted(slots, key=lambda slot: (-slot[0], slot[1])))
    step = priced.trial.step
    if not given:
        return None
    return with_rest(layer, [(u, d, size * step) for size, u, d in given], [(size * step, u) for size, u in rest])


def rounded(bundles: list[tuple[Pieces, float]], count: int, offset: float) -> list[Pieces]:
    """``count`` bundles, each kind of bundle within one of its part, and so for all runs of them by size."""
    total, done = sum(times for _, times in bundles), 0.0
    found: list[Pieces] = []
    for pieces, times in sorted(bundles, reverse=True):
        done += times * count / total
        found += [pieces] * (min(count, int(done + offset)) - len(found))
    return found


def _pieces(layer: LayerProblem, priced: Priced) -> list[tuple[float, int]]:
    """Size in lattice points and unit of every piece, largest first."""
    found = []
    for u, size in enumerate(priced.trial.size_U.tolist()):
        cut = priced.cuts.get(u, (size,))
        found += [(piece * size / sum(cut) if size > 0.0 else 0.0, u) for piece in cut]
    return sorted(found, key=lambda piece: (-piece[0], piece[1]))


def _by_rank(
    pieces: list[tuple[float, int]], slots: list[tuple[float, int]]
) -> tuple[list[tuple[float, int, int]], list[tuple[float, int]]]:
    """Every piece to the largest slot left, unless its unit is on that device; and pieces without a slot."""
    given: list[tuple[float, int, int]] = []
    rest, held, left = [], set[tuple[int, int]](), list(slots)
    for size, unit in pieces:
        at = next((i for i, (_, device) in enumerate(left) if (unit, device) not in held), -1)
        if at < 0:
            rest.append((size, unit))
            continue
        device = left.pop(at)[1]
        held.add((unit, device))
        given.append((size, unit, device))
    return given, rest
