"""Hand-written gradients against numerical ones, and against the plain formulas."""

import pytest
import torch
from concertina.workers.training.experts import experts
from concertina.workers.training.functions import paired_rows, rms_norm, rotary_turns, rotate


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def plain_experts(x_TD, ids_TK, weights_TK, gate_up_EGD, down_EDI):
    rows = []
    for x, ids, weights in zip(x_TD, ids_TK, weights_TK, strict=True):
        gate_up_KG = gate_up_EGD[ids] @ x
        gate_KI, up_KI = gate_up_KG.chunk(2, dim=1)
        y_KD = torch.einsum("kdi,ki->kd", down_EDI[ids], torch.nn.functional.silu(gate_KI) * up_KI)
        rows.append((weights[:, None] * y_KD).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("tokens", "width", "inner", "count", "top_k"), [(11, 4, 3, 4, 2), (1, 3, 2, 9, 3), (7, 2, 5, 1, 1)]
)
def test_experts_equal_the_plain_formula_and_its_gradients(tokens, width, inner, count, top_k):
    x, weights = _random(tokens, width), _random(tokens, top_k)
    gate_up, down = _random(count, 2 * inner, width), _random(count, width, inner)
    ids = torch.rand(tokens, count).topk(top_k).indices
    ours = experts(x, ids, weights, gate_up, down)
    torch.testing.assert_close(ours, plain_experts(x, ids, weights, gate_up, down))
    assert torch.autograd.gradcheck(lambda *a: experts(a[0], ids, *a[1:]), (x, weights, gate_up, down))


def test_unused_experts_get_zero_gradients_not_garbage():
    x, weights = _random(5, 4), _random(5, 1)
    gate_up, down = _random(3, 6, 4), _random(3, 4, 3)
    experts(x, torch.ones(5, 1, dtype=torch.int64), weights, gate_up, down).sum().backward()
    for gradient in (gate_up.grad, down.grad):
        assert gradient[[0, 2]].abs().max() == 0
        assert gradient[1].abs().min() > 0


def test_rms_norm():
    x, weight = _random(6, 5), _random(5)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), expected)
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-3), (x, weight))


def test_rotation_on_neighbours_is_the_checkpoint_s_rotation_on_halves_after_a_permutation():
    x_BLHd = torch.randn(2, 9, 3, 8)
    order = paired_rows(3, 8)
    turns = rotary_turns(9, 8, 10000.0)
    halves = x_BLHd.flatten(-2)[..., order].view_as(x_BLHd)
    first, second = halves.chunk(2, dim=-1)
    expected = torch.cat((first * turns.real - second * turns.imag, second * turns.real + first * turns.imag), -1)
    ours = rotate(x_BLHd, turns).flatten(-2)[..., order].view_as(x_BLHd)
    torch.testing.assert_close(ours, expected)
