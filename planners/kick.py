"""A disturbance that leaves most of a layout alone: a few devices' replicas are dealt out again, a little at random."""

from __future__ import annotations

import random

import numpy as np

from .layout import Layout, device_time_D
from .units import LayerProblem

DEVICES = (3, 4, 6, 9)
"""How many devices take part, the slowest one included."""
NOISE = 0.3
"""Replicas are dealt longest first, by lengths disturbed by up to this part."""


def kicked(layer: LayerProblem, layout: Layout, choose: random.Random) -> Layout | None:
    """The layout with the slowest device and some of the fastest dealt out again; None if they do not fit so.

    For plain layers.
    """
    time_D = device_time_D(layer, layout)
    fast = np.argsort(time_D, kind="stable")[: max(3, layer.devices // 4)].tolist()
    chosen = {int(time_D.argmax()), *choose.sample(fast, min(len(fast), choose.choice(DEVICES) - 1))}
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
