"""Kernels of the MoE layer against the plain reference, at odd sizes. Invariants M1 and M2 of docs/invariants.md."""

from __future__ import annotations

import pytest
import torch
from concertina.kernels import moe
from concertina.kernels.capabilities import float32_is_faster
from concertina.kernels.linear import add_linear, linear
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

KERNELS = [moe.fused_moe, moe.widening_moe]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is not written shows up as NaN."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))


def problem(T: int, K: int, E: int, H: int, inner: int, seed: int, dtype: torch.dtype, absent: float) -> tuple:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=g).to(dtype)
    ids = torch.rand(T, E, generator=g).topk(K, dim=-1).indices
    ids = ids.masked_fill(torch.rand(T, K, generator=g) < absent, -1)
    weights = torch.rand(T, K, generator=g)
    w13 = [(torch.randn(2 * inner, H, generator=g) / H**0.5).to(dtype) for _ in range(E)]
    w2 = [(torch.randn(H, inner, generator=g) / inner**0.5).to(dtype) for _ in range(E)]
    return x, ids, weights, w13, w2


def check(kernel: moe.MoeKernel, args: tuple) -> None:
    """M1: any kernel gives the reference's result, in the type of its input, and leaves its inputs as they were."""
    x, ids, weights, w13, w2 = args
    before = [t.clone() for t in (x, ids, weights, *w13, *w2)]
    y = kernel(*args)
    true = moe.moe_reference(x.float(), ids, weights, [w.float() for w in w13], [w.float() for w in w2])
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[x.dtype]
    torch.testing.assert_close(y.float(), true, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, ids, weights, *w13, *w2), strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [0, 1, 2, 63, 1000])
@pytest.mark.parametrize("absent", [0.0, 0.6, 1.0])
def test_kernels_agree_with_the_reference(kernel: moe.MoeKernel, dtype: torch.dtype, T: int, absent: float) -> None:
    check(kernel, problem(T, K=3, E=7, H=24, inner=17, seed=T, dtype=dtype, absent=absent))


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(0, 40), E=st.integers(1, 9), H=st.integers(1, 33), inner=st.integers(1, 33),
    seed=st.integers(0, 2**20), absent=st.sampled_from([0.0, 0.3, 1.0]), data=st.data(),
)  # fmt: skip
def test_kernels_agree_at_any_size(
    T: int, E: int, H: int, inner: int, seed: int, absent: float, data: st.DataObject
) -> None:
    args = problem(T, data.draw(st.integers(1, E)), E, H, inner, seed, torch.float32, absent)
    for kernel in KERNELS:
        check(kernel, args)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("T", [1, 9])
def test_a_chosen_expert_may_be_named_twice(kernel: moe.MoeKernel, T: int) -> None:
    x, ids, weights, w13, w2 = problem(T, 3, 5, 16, 8, 0, torch.float32, 0.0)
    ids[:] = ids[:, :1]
    check(kernel, (x, ids, weights, w13, w2))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("T", [1, 20])
def test_experts_may_be_one_tensor_with_gaps_between_them(kernel: moe.MoeKernel, T: int) -> None:
    x, ids, weights, w13, w2 = problem(T, 2, 6, 16, 8, 3, torch.bfloat16, 0.2)
    pages = torch.full((6, 1024), float("nan"), dtype=torch.bfloat16)  # an expert has 3 * 8 * 16 elements
    strided13, strided2 = pages[:, :256].view(6, 16, 16), pages[:, 256:384].view(6, 16, 8)
    strided13.copy_(torch.stack(w13))
    strided2.copy_(torch.stack(w2))
    assert torch.equal(kernel(x, ids, weights, strided13, strided2), kernel(x, ids, weights, w13, w2))


@pytest.mark.parametrize("kernel", KERNELS)
def test_tokens_do_not_see_each_other(kernel: moe.MoeKernel) -> None:
    """M2: a token's result in float32 is that of the token alone, whatever shares its batch."""
    x, ids, weights, w13, w2 = problem(50, 3, 5, 16, 8, 1, torch.float32, 0.1)
    x[7] = float("inf")
    together = kernel(x, ids, weights, w13, w2)
    for t in (0, 6, 8, 49):
        alone = kernel(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], w13, w2)
        torch.testing.assert_close(together[t : t + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 64, 100])
def test_linear_by_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int) -> None:
    monkeypatch.setattr("concertina.kernels.linear._MAX_WIDENED", 70)  # 3 outputs at a time, the last block 2
    monkeypatch.setattr("concertina.kernels.linear.float32_is_faster", lambda *_: True)
    g = torch.Generator().manual_seed(rows)
    x, w = torch.randn(rows, 23, generator=g).to(dtype), torch.randn(11, 23, generator=g).to(dtype)
    bias, residual = torch.randn(11, generator=g).to(dtype), torch.randn(rows, 11, generator=g).to(dtype)
    true = x.double() @ w.double().t()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    for y, expected in (
        (linear(x, w), true),
        (linear(x, w, bias), true + bias.double()),
        (add_linear(residual, x, w), true + residual.double()),
    ):
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_which_kernel_is_chosen_depends_on_the_processor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(device: str, dtype: torch.dtype, **has: object) -> moe.MoeKernel:
        float32_is_faster.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
        return moe.select_moe_kernel(device, dtype)

    try:
        assert choose("cpu", torch.bfloat16, architecture="x86_64") is moe.widening_moe
        assert choose("cpu", torch.bfloat16, architecture="x86_64", amx_bf16=True) is moe.fused_moe
        assert choose("cpu", torch.float16, architecture="x86_64", avx512_fp16=True) is moe.fused_moe
        assert choose("cpu", torch.float16, architecture="x86_64") is moe.widening_moe
        assert choose("cpu", torch.bfloat16, architecture="aarch64") is moe.fused_moe
        assert choose("cpu", torch.float32, architecture="x86_64") is moe.fused_moe
        assert choose("cuda", torch.bfloat16, architecture="x86_64") is moe.fused_moe
    finally:
        float32_is_faster.cache_clear()
