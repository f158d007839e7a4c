"""Bad problems are refused with field, value and expectation; capacity follows from slots and memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from concertina.errors import OperatorError
from concertina.planners.cluster import Cluster, Device, Links
from concertina.planners.model import Loads, ModelSpec
from concertina.planners.params import Params
from concertina.planners.problem import Objective, Options, Pair, PlacementProblem, Prices, Regime
from concertina.planners.solution import StoppingRule
from concertina.planners.solve import solve

from .instances import cluster, problem, single

ONES = np.ones((2, 4))


def device(**changes: object) -> Device:
    return Device(**({"name": "d", "kind": "k", "memory_bytes": 1, "flops": 1.0, "bandwidth_bytes_s": 1.0} | changes))  # type: ignore[arg-type]


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: device(name=""), "device: name: ''"),
    (lambda: device(flops=0.0), "device 'd': flops: 0.0"),
    (lambda: device(memory_bytes=-1), "device 'd': memory_bytes: -1"),
    (lambda: device(bandwidth_bytes_s=float("nan")), "device 'd': bandwidth_bytes_s: nan"),
    (lambda: Links(1.0, 2.0), "links: cluster_bytes_s: 2.0"),
    (lambda: Cluster(()), "cluster: devices"),
    (lambda: Cluster((device(), device())), "names that do not repeat"),
    (lambda: ModelSpec(0, 4, 1.0, 1.0), "model: layers: 0"),
    (lambda: ModelSpec(2, 4, 1.0, 1.0, top_k=5), "model: top_k: 5"),
    (lambda: ModelSpec(2, 4, 0.0, 1.0), "model: expert_bytes: 0.0"),
    (lambda: ModelSpec(2, 4, [1.0, 2.0, 3.0], 1.0), "model: expert_bytes: 'shape (3,)'"),
    (lambda: Loads(np.array([[1.0, -2.0]])), "loads: tokens_SLE[0, 1]: -2.0"),
    (lambda: Loads(np.array([[1.0, np.nan]])), "loads: tokens_SLE[0, 1]: nan"),
    (lambda: Loads(ONES, np.array([1.0, 1.0])), "loads: weights_S"),
    (lambda: Loads(ONES, pairs_PEE=np.ones((2, 4, 4))), "loads: pairs_PEE: 'shape (2, 4, 4)'"),
    (lambda: Regime("r", -1.0), "regime 'r': weight: -1.0"),
    (lambda: Objective(tail=1.0), "objective: tail: 1.0"),
    (lambda: Objective(split="sometimes"), "objective: split: 'sometimes'; expected one of fixed, per_batch"),
    (lambda: problem(ONES, [1.0, 1.0], [1, 2, 3]), "slots"),
    (lambda: problem(ONES, [1.0, 1.0], [-1, 9]), "slots"),
    (lambda: problem(ONES, [1.0, 1.0], 4, current=single(("d0",), [[0, 0]])), "current: '1 layers of 2 experts'"),
    (lambda: problem(ONES, [1.0], 4, options=Options(pinned=(Pair(9, "d0"),))), "options: pinned: expert: 9"),
    (lambda: problem(ONES, [1.0], 4, options=Options(forbidden=(Pair(0, "x"),))), "options: forbidden: device: 'x'"),
    (lambda: problem(ONES, [1.0], 4, options=Options(pinned=(Pair(0, "d0", 2),))), "options: pinned: layer: 2"),
    (lambda: problem(ONES, [1.0], 4, options=Options(groups=((0, 1), (1, 2)))), "options: groups"),
    (lambda: problem(ONES, [1.0], 4, options=Options(min_nodes=0)), "options: min_nodes: 0"),
    (lambda: PlacementProblem(cluster([1.0]), ModelSpec(3, 4, 1.0, 1.0), Loads(ONES)), "loads: tokens_SLE: (1, 2, 4)"),
    (lambda: PlacementProblem(cluster([1.0]), ModelSpec(2, 4, 1.0, 1.0), Loads(ONES), prices=Prices(-1.0)), "prices"),
    (lambda: Params(seed=-1), "params: seed: -1"),
    (lambda: StoppingRule(gap=-0.1), "stop: gap: -0.1"),
    (lambda: solve(problem(ONES, [1.0], 4), "magic"), "method: 'magic'; expected one of auto"),
]


@pytest.mark.parametrize(("make", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_refused_by_name(make: Callable[[], object], words: str) -> None:
    with pytest.raises(OperatorError) as caught:
        make()
    assert words in str(caught.value)
    assert "expected" in str(caught.value)


def test_problem_cannot_be_changed_through_its_arrays() -> None:
    tokens, slots = np.ones((1, 4)), np.array([2, 2])
    p = problem(tokens, [1.0, 1.0], slots)
    tokens[:], slots[:] = 7.0, 0
    assert p.loads.tokens_SLE.max() == 1.0
    assert p.slots_LD.tolist() == [[2, 2]]
    with pytest.raises(ValueError, match="read-only"):
        p.loads.tokens_SLE[0, 0, 0] = 5.0


def by_memory(memory_bytes: int, layers: int = 3, reserve: int = 0, slots: int | None = None) -> np.ndarray:
    p = PlacementProblem(
        cluster([1.0, 1.0], memory_bytes=memory_bytes),
        ModelSpec(layers, 8, 10.0, 1.0, shared_bytes=2.0),
        Loads(np.ones((layers, 8))),
        slots=slots,
        options=Options(memory_reserve_bytes=reserve),
    )
    return p.slots_LD


def test_slots_use_memory_up_to_the_last_whole_expert() -> None:
    slots = by_memory(memory_bytes=6 + 10 * 10 + 9)  # shared experts 3 x 2, ten routed experts, nine bytes too few
    assert slots.sum(axis=0).tolist() == [10, 10]
    assert slots.min() >= 3
    assert by_memory(6 + 100, reserve=1).sum(axis=0).tolist() == [9, 9]
    assert by_memory(0).sum() == 0
    assert by_memory(10**6, slots=2).tolist() == [[2, 2]] * 3


@pytest.mark.parametrize("slots", [None, 3])
def test_more_memory_never_takes_slots_away(slots: int | None) -> None:
    before = by_memory(0, slots=slots)
    for memory in range(0, 300, 7):
        now = by_memory(memory, slots=slots)
        assert (now >= before).all()
        before = now
