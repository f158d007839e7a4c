"""The adapter between the planners' split and the expert exchange."""

from __future__ import annotations

import torch
from concertina.planners.placement import Placement, Replica
from concertina.workers.batch_split import LEAST_PAIRS, BatchSplit
from hypothesis import given
from hypothesis import strategies as st

PLACEMENT = Placement(
    ("a", "b", "c"),
    (
        (
            (Replica(0, 0, 0.5), Replica(1, 0, 0.5)),
            (Replica(0, 1),),
            (Replica(1, 1, 0.2), Replica(2, 0, 0.3), Replica(0, 2, 0.5)),
            (Replica(2, 1),),
        ),
    ),
)


def work(counts: list[int], shares: torch.Tensor) -> float:
    """Most tokens on a device."""
    load = [0.0] * 3
    for expert, replicas in enumerate(PLACEMENT.replicas_LE[0]):
        for j, replica in enumerate(replicas):
            load[replica.device] += counts[expert] * float(shares[expert, j])
    return max(load)


@given(st.lists(st.integers(0, 500), min_size=4, max_size=4))
def test_shares_are_valid_and_no_worse_than_the_fixed_ones(counts):
    shares = BatchSplit(PLACEMENT)(0, torch.tensor(counts))
    if sum(counts) < LEAST_PAIRS:
        assert shares is None
        return
    assert shares.shape == (4, 3)
    assert torch.allclose(shares.sum(1), torch.ones(4, dtype=shares.dtype))
    assert (shares >= 0).all()
    absent = [(e, j) for e, replicas in enumerate(PLACEMENT.replicas_LE[0]) for j in range(len(replicas), 3)]
    assert all(shares[e, j] == 0 for e, j in absent)
    fixed = torch.tensor([[0.5, 0.5, 0], [1, 0, 0], [0.2, 0.3, 0.5], [1, 0, 0]])
    assert work(counts, shares) <= work(counts, fixed) + 3  # whole tokens


def test_it_takes_work_off_the_busiest_device():
    shares = BatchSplit(PLACEMENT)(0, torch.tensor([100, 300, 100, 100]))
    assert shares[0, 0] == 0, "device a is busy enough with expert 1"
    assert shares[2, 2] == 0
