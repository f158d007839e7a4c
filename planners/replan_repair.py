"""Local search for layers whose greedy re-plan misses the balance: full devices of sole replicas need exchanges.

The greedy only adds replicas, where spare ones can make room. On mixed devices with few spare slots that is not
enough; exchanges of existing replicas copy more, but reach the balance.
"""

from __future__ import annotations

import numpy as np

from .improve import Search
from .layout import Layout
from .replan_greedy import ReplanSearch, prune
from .routing import Routing
from .units import LayerProblem

ROUNDS = 400
SLACK = 1e-6
"""Part of the balance by which the local search goes beyond it, so that rounding does not miss it."""


def layout_of_state(state: Routing) -> Layout:
    """A re-plan's replicas and tokens as a layout, units ascending."""
    pairs = [(e, d) for e, flow in enumerate(state.flow_E) for d in sorted(flow)]
    tokens_R = np.array([state.flow_E[e][d] for e, d in pairs])
    return Layout(np.array([e for e, _ in pairs]), np.array([d for _, d in pairs]), tokens_R)


def repaired(search: ReplanSearch, layer: LayerProblem, bound_s: float, balance: float) -> ReplanSearch:
    """The layer after local search until it is balanced, or as near as that comes; never a worse one."""
    local = Search(layer, layout_of_state(search.state))
    local.run(bound_s, 1.0 - balance * (1.0 + SLACK), ROUNDS)
    other = ReplanSearch(search.task, _state(search, local.layout()))
    other.relieve()
    if other.excess <= 0:
        prune(other)
    return min(search, other, key=lambda s: s.score)


def _state(search: ReplanSearch, layout: Layout) -> Routing:
    task = search.task
    state = Routing.empty(task.tokens_E, task.read_ED, task.capacity_D)
    shares: list[dict[int, float]] = [{} for _ in range(task.experts)]
    for e, d, tokens in zip(layout.unit_R.tolist(), layout.device_R.tolist(), layout.tokens_R.tolist(), strict=True):
        state.add(e, d)
        shares[e][d] = max(0.0, tokens)
    for e, share in enumerate(shares):
        state.set_shares(e, share)
    return state
