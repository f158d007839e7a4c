"""Search over cuts where alike devices hold one to three replicas: which replicas share a device is then a formality.

Given the pieces that units are cut into and the number of triples, the largest pieces are alone and the next ones head
pairs. If the largest head first takes the largest companion that fits, pairs hold as much as they can, and least is
left for the triples (eq. 24), whose room is counted in all. So a layout is its cuts and a number of triples, judged in
some 20 microseconds; of such shapes, any that reaches the time of the best so far is the next to be changed.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from .fields import FloatArray, IntArray
from .layout import Layout
from .trios import ways
from .units import LayerProblem

HELD = 3
"""Most replicas of a device."""
CUT_FROM = 0.45
"""Part of a full piece from which on cutting a unit is tried."""
LOOKS = 8
"""Companions looked at for two parts of a unit that are to fill two devices exactly."""
SPARE, DEEPEST, HALVINGS = 0.02, 3e-3, 8
"""Spare room (part of a reading) from which on a shorter time is sought; how much shorter at most, and how finely."""
LONGER, TIMES = 5e-4, 20
"""The first shape may need a little more time than its layout took: steps of it, and how many."""
UNEVEN, WIDE = 0.003, 6
"""Part of a reading that triples are expected to stay uneven by, and how many of their largest pieces must fit."""
EXCHANGES, ROUNDS = 10, 100
"""Times that triples exchange a piece each, and that three of them are dealt out again."""

Cut = tuple[int, tuple[float, ...]]
"""Of a unit: pieces that fill a device alone, and the tokens of all other pieces but one."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How units are cut, the tokens of all others (ascending), and how many devices hold three pieces."""

    cuts: dict[int, Cut]
    whole: list[float]
    triples: int


def alike(layer: LayerProblem) -> bool:
    """Whether devices are alike, with slots for three, and replicas differ in tokens only."""
    if not layer.plain or int(layer.slots_D.min()) < HELD:
        return False
    table = np.stack([layer.token_s_D, layer.base_D, layer.read_UD[0]])
    return bool((table == table[:, :1]).all())


def pairable(layer: LayerProblem, layout: Layout) -> bool:
    """Whether `Pairing` can begin with the layout: devices that are `alike` hold one to three replicas each."""
    held_D = np.bincount(layout.device_R, minlength=layer.devices)
    return alike(layer) and int(held_D.min()) >= 1 and int(held_D.max()) <= HELD


class Pairing:
    """Search from one layout of a layer that is `pairable`; room, reading and pieces are in tokens."""

    def __init__(self, layer: LayerProblem, layout: Layout, time_s: float, seed: int) -> None:
        self.layer = layer
        self.read = float(layer.read_UD[0, 0] / layer.token_s_D[0])
        self.room = self._tokens(time_s)
        self.tokens = layer.tokens_U.tolist()
        self.shape = self._shape_of(layout)
        self._random = random.Random(seed)
        self._looked = 0
        self._rest = list[float]()
        self._cuttable = [u for u, t in enumerate(self.tokens) if t > CUT_FROM * (self.room - self.read)]

    def run(self, least_s: float, looks: int) -> Layout | None:
        """The best layout met after judging ``looks`` shapes, or at ``least_s``; None if the first does not come out.

        Its triples are not quite even: it is meant to be improved.
        """
        least = self._tokens(least_s)
        for _ in range(TIMES):
            if self.spare(self.shape) >= 0.0:
                break
            self.room *= 1.0 + LONGER
        else:
            return None
        self._lower(least)
        while self._looked < looks and self.room > least and self._cuttable:
            changed = self._changed()
            spare = -1.0 if changed is None else self.spare(changed)
            if changed is not None and spare >= 0.0:
                self.shape = changed
                if spare > SPARE * self.read:
                    self._lower(least)
        return self._layout()

    def spare(self, shape: Shape) -> float:
        """Room that triples have for more than they must hold; -1 if the pieces or pairs do not fit."""
        self._looked += 1
        rest = self._left(shape, [], quick=True)
        if rest is None:
            return -1.0
        self._rest, most = rest, self.room - (3.0 + UNEVEN) * self.read
        if any(sum(rest[-j:]) + sum(rest[: 2 * j]) > j * most for j in range(1, min(WIDE, shape.triples) + 1)):
            return -1.0
        return shape.triples * most - sum(rest)

    def _tokens(self, time_s: float) -> float:
        return float((time_s - self.layer.base_D[0]) / self.layer.token_s_D[0])

    def _shape_of(self, layout: Layout) -> Shape:
        held_D = np.bincount(layout.device_R, minlength=self.layer.devices)
        count_U = np.bincount(layout.unit_R, minlength=self.layer.units)
        cuts = dict[int, Cut]()
        for u in np.flatnonzero(count_U > 1).tolist():
            of_R = layout.unit_R == u
            alone_R = of_R & (held_D[layout.device_R] == 1)
            others = sorted(layout.tokens_R[of_R & ~alone_R].tolist(), reverse=True)
            cuts[u] = int(alone_R.sum()) - (not others), tuple(others[:-1])
        whole = sorted(t for u, t in enumerate(self.tokens) if u not in cuts)
        return Shape(cuts, whole, int((held_D == HELD).sum()))

    def _parts(self, unit: int, cut: Cut) -> tuple[int, list[float]]:
        """Pieces that fill a device alone, as many as the unit has tokens for, and the others."""
        full, alone = self.room - self.read, cut[0]
        left = self.tokens[unit] - alone * full
        while left <= 0.0 < alone:
            alone, left = alone - 1, left + full
        parts = []
        for part in cut[1]:
            if part < left:
                parts.append(part)
                left -= part
        return alone, [*parts, left]

    def _left(self, shape: Shape, groups: list[list[float]], quick: bool = False) -> list[float] | None:
        """What is left for triples, ascending, and in ``groups`` what the others hold; None if something does not fit.

        ``quick`` leaves the groups out.
        """
        sizes, full = shape.whole.copy(), 0
        for unit, cut in shape.cuts.items():
            alone, parts = self._parts(unit, cut)
            full += alone
            for part in parts:
                insort(sizes, part)
        heads = len(sizes) + full - self.layer.devices - 2 * shape.triples
        single = self.layer.devices - heads - shape.triples - full
        if min(heads, single, shape.triples) < 0 or sizes[-1] > self.room - self.read:
            return None
        groups += [[size] for size in sizes[len(sizes) - single :]]
        first = len(sizes) - single - heads
        rest, most = sizes[:first], self.room - 2.0 * self.read
        for at in range(first + heads - 1, first - 1, -1):
            fits = most - sizes[at]
            if quick and fits >= rest[-1]:
                del rest[len(rest) - (at - first + 1) :]
                break
            companion = bisect_right(rest, fits) - 1
            if companion < 0:
                return None
            groups.append([sizes[at], rest.pop(companion)])
        return rest

    def _lower(self, least: float) -> None:
        """Bisect for the least room in which the shape fits."""
        high, low = self.room, max(least, self.room * (1.0 - DEEPEST))
        self.room = low
        if self.spare(self.shape) >= 0.0:
            return
        for _ in range(HALVINGS):
            self.room = 0.5 * (low + high)
            low, high = (low, self.room) if self.spare(self.shape) >= 0.0 else (self.room, high)
        self.room = high

    def _changed(self) -> Shape | None:
        """The shape with one unit cut in another way, or one triple more or less, or both; None if that is no cut."""
        choice, shape = self._random.random(), self.shape
        if choice > 0.7:
            shape = replace(shape, triples=shape.triples + self._random.choice((-1, 1)))
        return shape if choice > 0.9 else self._recut(shape, self._random.choice(self._cuttable))

    def _recut(self, shape: Shape, unit: int) -> Shape | None:
        full, tokens, was = self.room - self.read, self.tokens[unit], shape.cuts.get(unit)
        most = int(tokens / full)
        alone = self._random.randint(max(0, most - 1), most)
        left, choice = tokens - alone * full, self._random.random()
        cuts, whole = shape.cuts.copy(), shape.whole.copy()
        if was is not None:
            del cuts[unit]
        else:
            del whole[bisect_left(whole, tokens)]
        if left <= full and (alone > 0 or was is not None) and choice < 0.55:
            if alone > 0:
                cuts[unit] = alone, ()
            else:
                insort(whole, tokens)
            return Shape(cuts, whole, shape.triples)
        part = self._part(left)
        if not 0.0 < part < left or max(part, left - part) > full:
            return None
        cuts[unit] = alone, (max(part, left - part),)
        return Shape(cuts, whole, shape.triples)

    def _part(self, tokens: float) -> float:
        """One of two parts: mostly such that both fill a device exactly with companions of those in triples now."""
        choice, most = self._random.random(), self.room - 2.0 * self.read
        if not self._rest:
            return 0.5 * tokens
        if choice < 0.25:
            companion = self._random.choice(self._rest)
            return companion if choice < 0.1 else most - companion
        best, empty = 0.0, np.inf
        for companion in self._random.choices(self._rest, k=LOOKS):
            left = 2.0 * most - tokens - companion
            other = bisect_right(self._rest, left) - 1
            if other >= 0 and left - self._rest[other] < empty:
                best, empty = most - companion, left - self._rest[other]
        return best

    def _layout(self) -> Layout:
        """Pieces on devices, in any order of these: they are alike. Pieces of one unit that meet become one."""
        groups, of = list[list[float]](), defaultdict[float, list[int]](list)
        rest = self._left(self.shape, groups)
        assert rest is not None
        for u, t in enumerate(self.tokens):
            alone, parts = self._parts(u, self.shape.cuts[u]) if u in self.shape.cuts else (0, [t])
            groups += [[self.room - self.read]] * alone
            of[self.room - self.read] += [u] * alone
            for part in parts:
                of[part].append(u)
        most = self.room - 3.0 * self.read
        groups += evened(np.array(rest), self.shape.triples, most, self._random.randrange(2**32)).tolist()
        replicas = [(of[size].pop(), d, size) for d, group in enumerate(groups) for size in group]
        unit_R, device_R, tokens_R = (np.array(column) for column in zip(*replicas, strict=True))
        both, of_R = np.unique(np.stack((unit_R, device_R)), axis=1, return_inverse=True)
        whole_R: FloatArray = np.bincount(of_R.ravel(), weights=tokens_R).astype(np.float64)
        return Layout(both[0], both[1], whole_R)


def evened(size_P: FloatArray, triples: int, most: float, seed: int) -> FloatArray:
    """Sizes in rows of three, with sums of at most ``most`` or nearly so.

    At first each row gives its k-th piece, and the largest of them goes to the row that has least: the rearrangement
    of least maximum. Then rows above ``most`` are dealt out again with two others, in the best of all ways.
    """
    choose = np.random.default_rng(seed)
    held_TK = np.sort(size_P)[::-1].reshape(HELD, triples).T.copy()
    for k in (1, 2, *choose.integers(0, HELD, EXCHANGES)):
        kept_T = held_TK.sum(axis=1) - held_TK[:, k]
        order = np.argsort(kept_T, kind="stable")
        held_TK[order, k] = np.sort(held_TK[:, k])[::-1]
    for _ in range(ROUNDS if triples >= HELD else 0):
        sum_T = held_TK.sum(axis=1)
        above = np.flatnonzero(sum_T > most)
        if len(above) == 0:
            break
        a = int(above[choose.integers(len(above))])
        _deal_again(held_TK, a, choose.permutation(np.delete(np.arange(triples), a)))
    return held_TK


def _deal_again(held_TK: FloatArray, a: int, others: IntArray) -> None:
    """Deal out row ``a`` and two of ``others``, taken in pairs, if that makes the largest of the three sums smaller."""
    half = len(others) // 2
    b_P, c_P = others[:half], others[half : 2 * half]
    nine_PK = np.concatenate((np.broadcast_to(held_TK[a], (half, HELD)), held_TK[b_P], held_TK[c_P]), axis=1)
    rows = ways(3 * HELD, (HELD, HELD, HELD))
    worst_WP = np.maximum(np.maximum(rows[0] @ nine_PK.T, rows[1] @ nine_PK.T), rows[2] @ nine_PK.T)
    way, p = divmod(int(worst_WP.argmin()), half)
    if worst_WP[way, p] < held_TK[a].sum() * (1.0 - 1e-9):
        for at, row in zip((a, b_P[p], c_P[p]), rows, strict=True):
            held_TK[at] = nine_PK[p][row[way] > 0.0]
