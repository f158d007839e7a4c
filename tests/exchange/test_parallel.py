"""Expert parallelism gives what one worker with all experts gives (X6), and replicas get their shares (X7)."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
import torch
from concertina.errors import InternalError, OperatorError
from concertina.planners.placement import Placement, Replica, balanced_placement
from concertina.workers.exchange.base import Exchange
from concertina.workers.exchange.parallel import ParallelExperts
from concertina.workers.exchange.routes import LayerRoutes, choose_replicas, count_pairs, layer_routes
from concertina.workers.exchange.solo import SoloExchange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from . import scenarios
from .crew import Crew, run_threads

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 4), seed=st.integers(0, 2**32), overlap_tokens=st.sampled_from([0, 2, 256]))
def test_equals_the_reference(size: int, seed: int, overlap_tokens: int) -> None:
    run_threads(size, 700, lambda ex: scenarios.expert_parallel(ex, seed, overlap_tokens=overlap_tokens))


@pytest.mark.ray
@pytest.mark.parametrize(("kind", "size"), [("shared", 3), ("gloo", 3), ("gloo", 2)])
def test_equals_the_reference_between_processes(crew: Crew, kind: str, size: int) -> None:
    crew.join(kind, size)
    for seed in range(8):
        crew.run("expert_parallel", seed=seed, batches=10, overlap_tokens=seed % 2 * 3)
    crew.leave()


def test_one_rank_is_the_kernel_itself() -> None:
    """The kernel gets the very tensors, with experts renamed to slots, and its answer is not touched."""
    placement = Placement(("a",), (((Replica(0, 2),), (Replica(0, 0),), (Replica(0, 1),)),))
    x, weights = torch.randn(2, 4), torch.rand(2, 2)
    answer = torch.randn(2, 4)
    calls: list[tuple[int, Tensor, list[list[int]], Tensor]] = []

    def local(layer: int, x_NH: Tensor, slots_NK: Tensor, weights_NK: Tensor) -> Tensor:
        calls.append((layer, x_NH, slots_NK.tolist(), weights_NK))
        return answer

    y = ParallelExperts(SoloExchange(), placement, local)(0, x, torch.tensor([[0, 1], [2, -1]]), weights)
    assert y is answer
    assert calls == [(0, x, [[2, 0], [1, -1]], weights)]


def test_one_rank_is_seen_to_move_with_every_layer() -> None:
    """It makes no call in which the exchange itself would note it, and a step of many layers is no hang."""
    ex, seen = SoloExchange(), []

    def local(layer: int, x_NH: Tensor, slots_NK: Tensor, weights_NK: Tensor) -> Tensor:
        seen.append(ex.alive_s)
        time.sleep(0.001)
        return x_NH

    parallel = ParallelExperts(ex, balanced_placement(["a"], 3, 2), local)
    began_s = time.monotonic()
    for layer in range(3):
        parallel(layer, torch.ones(1, 1), torch.tensor([[0]]), torch.ones(1, 1))
    assert began_s <= seen[0] < seen[1] < seen[2] <= time.monotonic()


shares = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4)


@given(shares_E=st.lists(shares, min_size=1, max_size=5), seed=st.integers(0, 2**32), offset=st.floats(0, 0.999))
def test_replicas_get_their_shares_of_a_batch(shares_E: list[list[float]], seed: int, offset: float) -> None:
    """Within one batch each replica is less than one pair off its share."""
    rng = random.Random(seed)
    routes, replicas_E = _routes(shares_E)
    ids = torch.tensor([rng.randint(-1, len(shares_E) - 1) for _ in range(rng.randint(0, 60))]).long().view(-1, 1)
    seen = torch.tensor([rng.randrange(2**40) for _ in shares_E])
    chosen = choose_replicas(routes, ids, count_pairs(ids, len(shares_E)), seen, offset).flatten().tolist()
    pairs = Counter(zip(ids.flatten().tolist(), chosen, strict=True))
    totals = Counter(ids.flatten().tolist())
    for e, replicas in enumerate(replicas_E):
        for j, replica in enumerate(replicas):
            assert abs(pairs[e, j] - replica.share * totals[e]) < 1 + 1e-6
        assert sum(pairs[e, j] for j in range(len(replicas))) == totals[e]


@given(shares_J=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4), offset=st.floats(0, 0.999))
@settings(max_examples=30, deadline=None)
def test_replicas_get_their_shares_of_single_pairs(shares_J: list[float], offset: float) -> None:
    """Over many batches of one pair each, too: 300 experts here stand for 300 batches of one."""
    routes, (replicas, *_) = _routes([shares_J] * 300)
    ids = torch.arange(300)[:, None]
    got = Counter(choose_replicas(routes, ids, count_pairs(ids, 300), torch.arange(300), offset).flatten().tolist())
    # the discrepancy of the golden ratio's sequence is O(log n): at most 3 of 300
    assert all(abs(got[j] - 300 * r.share) < 3 for j, r in enumerate(replicas))


def _routes(shares_E: list[list[float]]) -> tuple[LayerRoutes, list[tuple[Replica, ...]]]:
    replicas_E = [tuple(Replica(d, 0, s / sum(row)) for d, s in enumerate(row)) for row in shares_E]
    return layer_routes(replicas_E, CPU), replicas_E


def test_split_replaces_shares_batch_by_batch() -> None:
    placement = Placement(("a", "b"), (((Replica(0, 0, 0.5), Replica(1, 0, 0.5)), (Replica(1, 1),)),))
    ids = torch.tensor([[0], [0], [1], [0]])

    def work(ex: Exchange) -> list[int]:
        asked: list[tuple[int, list[int]]] = []
        rows: list[int] = []

        def split(layer: int, counts_E: Tensor) -> Tensor | None:
            asked.append((layer, counts_E.tolist()))
            return [torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), None][
                len(asked) - 1
            ]

        def local(layer: int, x_NH: Tensor, slots_NK: Tensor, weights_NK: Tensor) -> Tensor:
            rows.append(x_NH.shape[0])
            return x_NH

        parallel = ParallelExperts(ex, placement, local, split=split)
        for _ in range(3):
            y = parallel(0, torch.ones(4, 2), ids, torch.ones(4, 1))
            assert torch.equal(y, torch.ones(4, 2))
        assert asked == [(0, [3, 1])] * 3
        return rows

    first, second = run_threads(2, 256, work)
    assert first[0] == 6, "all pairs of expert 0 of both members"
    assert second[:2] == [2, 8], "then none of them, then all"
    assert sum(first) + sum(second) == 24


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (torch.ones(2, 2) / 2, "sum to 1 over each expert's replicas"),
        (torch.tensor([[0.5, 0.4], [1, 0]]), "sum to 1"),
        (torch.tensor([[1.5, -0.5], [1, 0]]), "at least 0"),
        (torch.ones(2, 1), r"shape \(2, 2\), got \(2, 1\)"),
    ],
)
def test_bad_split_is_refused(share: Tensor, message: str) -> None:
    placement = Placement(("a", "b"), (((Replica(0, 0, 0.5), Replica(1, 0, 0.5)), (Replica(1, 1),)),))

    def work(ex: Exchange) -> None:
        parallel = ParallelExperts(ex, placement, lambda *_: torch.ones(1, 1), split=lambda layer, counts: share)
        with pytest.raises(InternalError, match=message):
            parallel(0, torch.ones(1, 1), torch.tensor([[0]]), torch.ones(1, 1))

    run_threads(2, 64, work)


@pytest.mark.parametrize("ids", [[[2]], [[-2]], [[0], [7]]])
def test_unknown_experts_are_refused(ids: list[list[int]]) -> None:
    parallel = ParallelExperts(SoloExchange(), balanced_placement(["a"], 1, 2), lambda *_: torch.ones(1, 1))
    with pytest.raises(InternalError, match=r"expected ids in -1\.\.1, got -?[27]"):
        parallel(0, torch.ones(len(ids), 1), torch.tensor(ids), torch.ones(len(ids), 1))


def test_placement_must_fit_the_members() -> None:
    with pytest.raises(OperatorError, match=r"devices: expected one for each of the 1 members, got \('a', 'b'\)"):
        ParallelExperts(SoloExchange(), balanced_placement(["a", "b"], 1, 2), lambda *_: torch.ones(1, 1))


def test_no_tokens_anywhere() -> None:
    def work(ex: Exchange) -> list[int]:
        parallel = ParallelExperts(ex, balanced_placement(["a", "b", "c"], 2, 4), lambda *_: torch.ones(1, 1))
        empty = torch.empty(0, 8, dtype=torch.bfloat16)
        return list(parallel(1, empty, torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)).shape)

    assert run_threads(3, 64, work) == [[0, 8]] * 3
