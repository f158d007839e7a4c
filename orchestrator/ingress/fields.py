"""Reads fields of a request body one by one; a wrong one is a 400 that names its path."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .api_errors import ApiError, invalid, unsupported

MAX_SHOWN = 80  # characters of a wrong value that an error repeats


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object being read.

    Parameters
    ----------
    data : mapping
        The object.
    path : str
        Where it stands in the body, for instance ``messages[0]``; empty for the body itself.
    """

    data: Mapping[str, Any]
    path: str = ""

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def get(self, key: str) -> Any:
        return self.data.get(key)

    def wrong(self, key: str, expected: str) -> ApiError:
        """400: what was found at ``key`` and what was expected."""
        if key not in self.data:
            return invalid(f"{self.name(key)} is missing: expected {expected}", self.name(key), "missing_field")
        shown = repr(self.data[key])
        shown = shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "…"
        return invalid(f"{self.name(key)}: {shown}: expected {expected}", self.name(key), "invalid_value")

    def integer(self, key: str, default: int | None, low: int, high: int) -> int | None:
        """An integer in [low, high]; null and absence mean the default."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float, accepts: Callable[[float], bool], expected: str) -> float:
        """A finite number that ``accepts`` likes."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, expected)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or not accepts(number):
            raise self.wrong(key, expected)
        return number

    def boolean(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str) -> str:
        """A non-empty string that must be there."""
        value = self.get(key)
        if not isinstance(value, str) or not value:
            raise self.wrong(key, "a non-empty string")
        return value

    def child(self, key: str) -> Fields:
        """An object; null and absence mean an empty one."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(value or {}, self.name(key))

    def strings(self, key: str, most: int, longest: int) -> tuple[str, ...]:
        """A string or a list of strings, none empty."""
        value = self.get(key)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        good = isinstance(values, list) and len(values) <= most
        if not good or any(not isinstance(v, str) or not 0 < len(v) <= longest for v in values):
            raise self.wrong(key, f"a string or a list of up to {most} strings, each of 1 to {longest} characters")
        return tuple(values)

    def integers(self, key: str, below: int) -> tuple[int, ...]:
        """A list of integers in [0, below)."""
        value = self.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not are_ids(value, below):
            raise self.wrong(key, f"a list of integers from 0 to {below - 1}")
        return tuple(value)

    def refuse(self, neutral: Mapping[str, Sequence[Any]]) -> None:
        """Refuse each of these fields unless it is absent, null or one of its neutral values."""
        for key, values in neutral.items():
            value = self.get(key)
            if value is None or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
                continue
            hint = " or ".join(repr(v) for v in values)
            raise unsupported(self.name(key), f"leave it out{f', or use {hint}' if hint else ''}")


def are_ids(values: Sequence[Any], below: int) -> bool:
    """All are integers in [0, below)."""
    return all(type(v) is int and 0 <= v < below for v in values)
