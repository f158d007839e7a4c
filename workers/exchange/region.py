"""How a buffer becomes an address."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from ...errors import OperatorError
from .layout import LINE


def address_of(region: Any, needed: int) -> tuple[int, object]:
    """Address of a writable buffer or uint8 CPU tensor, and the object that keeps it mapped.

    Raises
    ------
    OperatorError
        The region is smaller than ``needed`` bytes, read-only or not one run of aligned bytes.
    """
    if isinstance(region, torch.Tensor):
        if region.dtype != torch.uint8 or region.device.type != "cpu" or not region.is_contiguous():
            raise OperatorError(
                f"exchange: region: expected contiguous uint8 on cpu, got {region.dtype} {region.device}"
            )
        keep: object = region
        address, nbytes = region.data_ptr(), region.numel()
    else:
        view = memoryview(region)
        if view.readonly or not view.contiguous:
            raise OperatorError("exchange: region: expected a writable, contiguous buffer")
        nbytes = view.nbytes
        keep = array = (ctypes.c_ubyte * nbytes).from_buffer(region)
        address = ctypes.addressof(array)
    if nbytes < needed or address % LINE:
        raise OperatorError(
            f"exchange: region: expected at least {needed} bytes on a multiple of {LINE}, got {nbytes} at {address:#x}"
        )
    return address, keep
