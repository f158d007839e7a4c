"""The bound by worth (eq. 16): its function is dual feasible, and no placement beats it; invariant P-2."""

from __future__ import annotations

import numpy as np
import pytest
from concertina.planners.bounds import case_bound, count_bound
from concertina.planners.cost import Replicas, best_split
from concertina.planners.problem import PlacementProblem
from concertina.planners.units import layer_problem
from concertina.planners.value_bound import SLOPES, step_function

from .instances import one_layer_choices, problem

GRAIN = 1200
"""Parts of a device in which sizes are counted; a multiple of 2 and 3, where the function has its corners."""


@pytest.mark.parametrize("slope", SLOPES)
def test_no_device_holds_more_than_one(slope: float) -> None:
    """The most that any number of parts adding up to a device can be worth, by dynamic programming."""
    worth = step_function(np.arange(GRAIN + 1) / GRAIN, slope)
    most = np.zeros(GRAIN + 1)
    for size in range(1, GRAIN + 1):
        most[size] = max(most[size - 1], float((worth[1 : size + 1] + most[size - 1 :: -1][:size]).max()))
    assert most[GRAIN] == pytest.approx(1.0, abs=1e-12)


def optimum(p: PlacementProblem) -> float:
    """The least time over every assignment of device sets, each with its best shares."""
    layer = layer_problem(p, 0)
    least = np.inf
    for choice in one_layer_choices(p, 0):
        pairs = [(u, d) for u, devices in enumerate(choice) for d in devices]
        unit_R, device_R = np.array(pairs).T
        read_D = np.bincount(device_R, weights=layer.read_UD[unit_R, device_R], minlength=layer.devices)
        replicas = Replicas(unit_R, device_R, np.ones(len(pairs)))
        time_D = best_split(replicas, layer.tokens_U, layer.token_s_D, layer.base_D + read_D)
        least = min(least, float(time_D.max()))
    return least


@pytest.mark.parametrize("speeds", [[1.0, 1.0, 1.0], [2.0, 2.0, 1.0], [1.5, 1.0, 1.0]], ids=str)
def test_no_placement_beats_the_bound(speeds: list[float]) -> None:
    """P-2, where reading weights matters: brute force over loads at random."""
    raised = 0
    for seed in range(6):
        tokens = np.random.default_rng(seed).lognormal(0.0, 0.6, (1, 5)).round(2) * 10.0
        p = problem(tokens, speeds, 2, expert_bytes=12.0)
        layer = layer_problem(p, 0)
        counted = count_bound(layer, layer.tokens_U, layer.base_D)
        bound = case_bound(layer, layer.tokens_U, layer.base_D)
        assert counted <= bound <= optimum(p) * (1 + 1e-9)
        raised += bound > counted * 1.001
    assert raised > 0
