"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): frequencies, tables, rotation in place."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ..families.base import Rope, RopeScaling


def inverse_frequencies(rope: Rope) -> Tensor:
    """Radians per position of each rotated pair, float32 [dims / 2], stretched as ``rope.scaling`` says."""
    plain = 1.0 / rope.theta ** (torch.arange(0, rope.dims, 2, dtype=torch.float32) / rope.dims)
    scaling = rope.scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    return _yarn(plain, rope, scaling)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's: long waves are stretched, short ones kept, those between blended by their turns per context."""
    turns = scaling.original_max_positions * plain / (2 * math.pi)
    keep = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / scaling.factor


def _yarn(plain: Tensor, rope: Rope, scaling: RopeScaling) -> Tensor:
    """YaRN's "NTK by parts" (Peng et al. 2023, arXiv 2309.00071, section 3.2), ramped over dimensions."""

    def dimension(turns: float) -> float:  # the dimension whose wave turns that often over the trained context
        return rope.dims * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    span = high - low or 0.001
    stretch = ((torch.arange(rope.dims // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / scaling.factor * stretch + plain * (1 - stretch)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Growth of attention's temperature with the stretch (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def table_scale(rope: Rope) -> float:
    """What cosines and sines are multiplied with; 1 unless YaRN."""
    s = rope.scaling
    if s is None or s.kind != "yarn":
        return 1.0
    if s.attention_factor is not None:
        return s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return yarn_mscale(s.factor, s.mscale) / yarn_mscale(s.factor, s.mscale_all_dim)
    return yarn_mscale(s.factor)


@cache
def rope_table(rope: Rope, dtype: torch.dtype, device: torch.device) -> RopeTable:
    """The table of this process: what it has grown to serves the next generation's first step, too."""
    return RopeTable(rope, dtype, device)


class RopeTable:
    """Cosines and signed sines by position, grown as longer sequences come.

    A pair (a, b) at angle p becomes (a cos p - b sin p, b cos p + a sin p). With the pair's members swapped in a copy,
    that is ``x * cos + swapped * sin`` where sin carries the sign; both tables are as wide as the rotated part.
    """

    def __init__(self, rope: Rope, dtype: torch.dtype, device: torch.device) -> None:
        self._rope, self._dtype, self._device = rope, dtype, device
        self._frequencies = inverse_frequencies(rope)
        self._scale = table_scale(rope)
        self._tables = (torch.empty(0, rope.dims, dtype=dtype, device=device),) * 2  # replaced together

    def at(self, positions_T: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Tables [T, 1, dims] for these positions, all below ``longest``."""
        cos, sin = self._tables
        if longest > len(cos):
            cos, sin = self._tables = self._of(max(longest, 2 * len(cos), 256))
        return cos[positions_T].unsqueeze(1), sin[positions_T].unsqueeze(1)

    def _of(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self._frequencies)
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        if self._rope.interleaved:
            cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.to(self._device, self._dtype), sin.to(self._device, self._dtype)

    def rotate_(self, x_ThD: Tensor, tables: tuple[Tensor, Tensor]) -> None:
        """Rotate the first ``dims`` of the last dimension in place."""
        cos, sin = tables
        dims = self._rope.dims
        part = x_ThD if x_ThD.shape[-1] == dims else x_ThD[..., :dims]
        pairs = (dims // 2, 2) if self._rope.interleaved else (2, dims // 2)
        swapped = part.view(*part.shape[:-1], *pairs).flip(-1 if self._rope.interleaved else -2).view(part.shape)
        part.mul_(cos).addcmul_(swapped, sin)
