"""Typed access to the fields of a ``config.json``, with errors that name the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import OperatorError


class _Required:
    """Marks a field without a default (None is a value that configurations use)."""


REQUIRED = _Required()


class ConfigReader:
    """The fields of one JSON object.

    A field that is absent or null takes its default where one is given. ``names`` may list several spellings; the
    first that is present counts, and messages use the first.

    Parameters
    ----------
    data : mapping
        The parsed object.
    source : str
        What messages begin with, usually the file's path.
    """

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data = data
        self.source = source

    @classmethod
    def from_file(cls, path: Path) -> ConfigReader:
        """Read a JSON file.

        Raises
        ------
        OperatorError
            The file is missing, unreadable or not a JSON object.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise OperatorError(f"{path}: expected a readable JSON file; {e}") from e
        if not isinstance(data, dict):
            raise OperatorError(f"{path}: expected a JSON object, got {type(data).__name__}")
        return cls(data, str(path))

    def fail(self, name: str, expected: str) -> OperatorError:
        """The error for field ``name`` (dots lead into objects), to be raised by the caller."""
        value: Any = self.data
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return OperatorError(f"{self.source}: {name}: expected {expected}, got {value!r}")

    def child(self, name: str) -> ConfigReader:
        """A reader of the object in field ``name``; of an empty one where the field is absent or null."""
        value = self.get(name, None)
        if value is not None and not isinstance(value, Mapping):
            raise self.fail(name, "an object")
        return ConfigReader(value or {}, f"{self.source}: {name}")

    def get(self, name: str, *others: str | None) -> Any:
        """The raw value under the first spelling that is present and not null, else None."""
        for key in (name, *others):
            if key is not None and self.data.get(key) is not None:
                return self.data[key]
        return None

    def integer(self, *names: str, default: int | _Required | None = REQUIRED, low: int = 1) -> int:
        """A whole number of at least ``low``."""
        value = self.get(*names)
        if value is None and isinstance(default, int):
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.fail(names[0], f"a whole number of at least {low}")
        return value

    def optional_integer(self, *names: str, low: int = 0) -> int | None:
        """A whole number, or None where the field is absent or null."""
        return None if self.get(*names) is None else self.integer(*names, low=low)

    def number(self, *names: str, default: float | _Required = REQUIRED, positive: bool = True) -> float:
        """A finite number, above 0 unless ``positive`` is false."""
        value = self.get(*names)
        if value is None and not isinstance(default, _Required):
            return float(default)
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or (positive and value <= 0):
            raise self.fail(names[0], "a positive number" if positive else "a number")
        return float(value)

    def optional_number(self, *names: str) -> float | None:
        """A positive number, or None where the field is absent or null."""
        return None if self.get(*names) is None else self.number(*names)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A whole number or a list of them, as a tuple; empty where the field is absent or null."""
        value = self.get(name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in values):
            raise self.fail(name, "a whole number or a list of them")
        return tuple(values)
