"""Checks of single fields, all with one shape of error: where, what was found, what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import OperatorError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def fail(where: str, value: object, expected: str) -> NoReturn:
    raise OperatorError(f"{where}: {value!r}; expected {expected}")


def finite(where: str, value: float, least: float = 0.0, most: float = math.inf) -> float:
    """The value, if it is a finite number in [least, most]."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value <= most:
        top = "" if math.isinf(most) else f" and <= {most:g}"
        fail(where, value, f"a finite number >= {least:g}{top}")
    return value


def positive(where: str, value: float) -> float:
    """The value, if it is a finite number above 0."""
    if finite(where, value) == 0:
        fail(where, value, "a number above 0")
    return value


def choice(where: str, value: str, options: Sequence[str]) -> str:
    if value not in options:
        fail(where, value, f"one of {', '.join(options)}")
    return value


def frozen_array(where: str, value: Any, dims: int) -> FloatArray:
    """A read-only float64 copy with ``dims`` dimensions of finite numbers, none below 0."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        fail(where, value, f"numbers in {dims} dimensions")
    if array.ndim != dims or array.size == 0:
        fail(where, f"shape {array.shape}", f"{dims} non-empty dimensions")
    bad = ~np.isfinite(array) | (array < 0)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        fail(f"{where}[{', '.join(map(str, at))}]", float(array[at]), "a finite number >= 0")
    array.setflags(write=False)
    return array
