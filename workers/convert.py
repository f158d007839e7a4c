"""Floating-point conversion between F32, F16 and BF16 in numpy, which has no BF16: its bits are handled as uint16.

Rounding is to nearest, ties to even (IEEE 754); infinities and signs are kept, too large becomes infinite, and a NaN
stays one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import OperatorError

_STORED: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_BF16_QUIET_NAN = np.uint32(0x40)


def check_convertible(source: str, to: str, what: str) -> None:
    """Raise OperatorError unless `convert` knows both dtypes; ``what`` begins the message."""
    if source not in _STORED or to not in _STORED:
        raise OperatorError(f"{what}: cannot convert {source} to {to}; expected both among {', '.join(_STORED)}")


def convert(raw: memoryview | bytes, source: str, out: memoryview, to: str) -> None:
    """Write the elements of ``raw`` (dtype ``source``) as dtype ``to`` into ``out``, which fits them exactly."""
    values = np.frombuffer(raw, _STORED[source])
    out_values = np.frombuffer(out, _STORED[to])
    wide = _widen(values) if source == "BF16" else values.astype(np.float32, copy=False)
    _NARROW[to](wide, out_values)


def _widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _to_numpy(values: NDArray[np.float32], out: NDArray[np.generic]) -> None:
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        np.copyto(out, values, casting="same_kind")


def _to_bf16(values: NDArray[np.float32], out: NDArray[np.generic]) -> None:
    bits = values.view(np.uint32)
    rounded = bits >> 16
    nan = np.isnan(values)
    quiet = rounded[nan] | _BF16_QUIET_NAN
    rounded &= 1  # odd results round a tie up
    rounded += np.uint32(0x7FFF)
    rounded += bits  # wraps for some NaNs only
    rounded >>= 16
    rounded[nan] = quiet
    np.copyto(out, rounded, casting="unsafe")


_NARROW: dict[str, Callable[[NDArray[np.float32], NDArray[np.generic]], None]] = {
    "F32": _to_numpy,
    "F16": _to_numpy,
    "BF16": _to_bf16,
}
