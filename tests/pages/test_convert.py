"""P8: conversions equal torch's bit for bit; NaNs stay NaNs (torch's own NaN bits differ between its code paths)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from concertina.errors import OperatorError
from concertina.workers.convert import check_convertible, convert

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {"F32": torch.int32, "F16": torch.int16, "BF16": torch.int16}


def interesting(dtype: str) -> torch.Tensor:
    if dtype != "F32":  # every value there is
        return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(TORCH[dtype])
    high = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)  # every sign, exponent and BF16 mantissa...
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)  # ...about ties
    corners = (high[:, None] | low[None, :]).reshape(-1)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    near = np.concatenate([halves + np.uint32(d) for d in (0xFFFFF000, 0xFFFFFFFF, 0, 1, 0x0FFF, 0x1000, 0x1001)])
    noise = np.random.default_rng(7).integers(0, 1 << 32, 1 << 17, dtype=np.uint32)
    return torch.from_numpy(np.concatenate([corners, near, noise]).view(np.int32)).view(torch.float32)


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("to", ["F32", "F16", "BF16"])
def test_equals_torch_bit_for_bit(source: str, to: str) -> None:
    values = interesting(source)
    expected = values.to(TORCH[to])
    raw = values.view(torch.uint8).numpy().tobytes()
    out = bytearray(expected.numel() * expected.itemsize)
    convert(raw, source, memoryview(out), to)
    found = torch.frombuffer(out, dtype=TORCH[to])
    nan = torch.isnan(values)
    assert bool(nan.any())
    assert torch.equal(torch.isnan(found), nan)
    assert torch.equal(found.view(BITS[to])[~nan], expected.view(BITS[to])[~nan])
    assert torch.equal(torch.signbit(found[nan]), torch.signbit(values[nan]))


def test_nothing_converts_to_nothing() -> None:
    convert(b"", "F32", memoryview(bytearray()), "BF16")


@pytest.mark.parametrize(("source", "to"), [("F8_E4M3", "BF16"), ("F32", "I32"), ("F64", "F32")])
def test_other_dtypes_are_refused(source: str, to: str) -> None:
    with pytest.raises(OperatorError, match=f"w.bin: cannot convert {source} to {to}"):
        check_convertible(source, to, "w.bin")
