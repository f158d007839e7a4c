"""A disturbance that leaves most of a layout alone: a few devices' replicas are dealt out again, a little at random."""

from __future__ import annotations

import random

import numpy as np

from .layout import Layout, device_time_D
from .units import LayerProblem

DEVICES = (3, 4, 6, 9)
"""How many devices take part, the slowest one included."""
NEAR, OFTEN = 0.98, 0.7
"""Devices at least so slow, by the slowest, take part so often; otherwise the fastest."""
NOISE = 0.3
"""Replicas are dealt longest first, by lengths disturbed by up to this part."""


def kicked(layer: LayerProblem, layout: Layout, choose: random.Random) -> Layout | None:
    """The layout with the slowest device and some others dealt out again; None if they do not fit so.

    The others are some of the fastest, or of those nearly as slow: where devices hold two or three replicas, nothing
    else fits beside what the fastest hold. For plain layers.
    """
    time_D = device_time_D(layer, layout)
    fast = np.argsort(time_D, kind="stable")[: max(3, layer.devices // 4)].tolist()
    slowest = int(time_D.argmax())
    near = np.flatnonzero((time_D > NEAR * time_D[slowest]) & (np.arange(layer.devices) != slowest)).tolist()
    some = near if len(near) >= 3 and choose.random() < OFTEN else fast
    chosen = {slowest, *choose.sample(some, min(len(some), choose.choice(DEVICES) - 1))}
    dealt = [r for r in range(len(layout.unit_R)) if int(layout.device_R[r]) in chosen]
    dealt.sort(key=lambda r: -float(layout.tokens_R[r]) * choose.uniform(1 - NOISE, 1 + NOISE))
    left = {d: int(layer.slots_D[d]) for d in sorted(chosen)}
    time = {d: float(layer.base_D[d]) for d in sorted(chosen)}
    device_R, held = layout.device_R.copy(), set[tuple[int, int]]()
    for r in dealt:
        u, tokens = int(layout.unit_R[r]), float(layout.tokens_R[r])
        after = {
            d: time[d] + float(layer.read_UD[u, d] + layer.token_s_D[d] * tokens)
            for d in left
            if left[d] > 0 and (u, d) not in held
        }
        if not after:
            return None
        d = min(after, key=lambda x: after[x])
        time[d], left[d], device_R[r] = after[d], left[d] - 1, d
        held.add((u, d))
    return Layout(layout.unit_R, device_R, layout.tokens_R)
