"""What this machine's processor multiplies well."""

from __future__ import annotations

from functools import cache

import torch


@cache
def float32_is_faster(device_type: str, dtype: torch.dtype) -> bool:
    """Whether large products of ``dtype`` are faster when first widened to float32.

    So on x86 without matrix instructions for the type: bfloat16 products there reach about half of float32's rate
    (docs/kernels.md). Decided by what the processor has, never by timing, so that every run computes alike.
    """
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    has = torch.cpu.get_capabilities()
    if has.get("architecture") != "x86_64":
        return False
    if dtype is torch.bfloat16:
        return not has.get("amx_bf16", False)
    return not (has.get("amx_fp16", False) or has.get("avx512_fp16", False))
