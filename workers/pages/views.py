"""Tensors over mapped pages. The one module here that imports torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...errors import InternalError
from .ranges import MemfdRange


def view(
    mapped: MemfdRange,
    dtype: torch.dtype,
    shape: Sequence[int],
    *,
    byte_offset: int = 0,
    strides: Sequence[int] | None = None,
) -> torch.Tensor:
    """A tensor over a range's pages; it keeps the range's addresses alive, also after the range object is gone.

    Parameters
    ----------
    mapped : MemfdRange
    dtype : torch.dtype
    shape : sequence of int
    byte_offset : int
        Of the first element, from the range's position 0; a multiple of the element size.
    strides : sequence of int or None
        In elements, not negative; None means contiguous.

    Returns
    -------
    torch.Tensor
        Writable as far as torch knows; writing through pages that were mapped read-only ends the process, as does
        touching positions that were unmapped later.

    Raises
    ------
    InternalError
        Outside the range, over an unmapped position, or misaligned.
    """
    if strides is not None and (len(strides) != len(shape) or min(strides, default=0) < 0):
        raise InternalError(f"view: strides {list(strides)} do not fit shape {list(shape)}")
    if byte_offset % dtype.itemsize:
        raise InternalError(f"view: byte_offset {byte_offset} is no multiple of {dtype.itemsize} ({dtype})")
    count = _span(shape, strides)
    mapped.check_mapped(byte_offset, count * dtype.itemsize)
    if count == 0:
        return torch.empty(list(shape), dtype=dtype)
    offset = mapped.buffer_offset + byte_offset
    flat = torch.frombuffer(mapped.buffer, dtype=dtype, count=count, offset=offset)
    return flat.view(list(shape)) if strides is None else flat.as_strided(list(shape), list(strides))


def _span(shape: Sequence[int], strides: Sequence[int] | None) -> int:
    """Elements from the first to one past the last that a view touches."""
    if strides is None or 0 in shape:
        return math.prod(shape)
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
