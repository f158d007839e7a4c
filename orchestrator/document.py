"""YAML and JSON files as trees whose every error names the file, the field, what was found and what was expected."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..errors import OperatorError

_QUANTITY = re.compile(
    r"(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*(?P<prefix>[kKMGTP]i?)?\s*(?P<unit>B|FLOPS?|FLOP/s|B/s|/s|s)?"
)
_PREFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "pi": 2**50}


class Node:
    """One value of a document, and where it is."""

    def __init__(self, value: Any, source: str, path: str = "") -> None:
        self.value, self.source, self.path = value, source, path

    def fail(self, expected: str) -> NoReturn:
        shown = repr(self.value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        where = f"{self.source}: {self.path}" if self.path else self.source
        raise OperatorError(f"{where}: {shown}; expected {expected}")

    def child(self, key: str) -> Node:
        return Node(self.value[key], self.source, f"{self.path}.{key}" if self.path else key)

    def fields(self, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Node]:
        """The fields of a mapping; an unknown or missing one is an error."""
        if not isinstance(self.value, dict):
            self.fail(f"a mapping with {', '.join(required + optional)}")
        for key in self.value:
            if key not in required + optional:
                where = f"{self.path}.{key}" if self.path else str(key)
                Node(self.value[key], self.source, where).fail(
                    f"no such field; known: {', '.join(required + optional)}"
                )
        missing = [key for key in required if key not in self.value]
        if missing:
            self.fail(f"a mapping with the field {missing[0]!r}")
        return {key: self.child(key) for key in self.value}

    def items(self, what: str = "a list", least: int = 1) -> list[Node]:
        if not isinstance(self.value, list) or len(self.value) < least:
            self.fail(what)
        return [Node(v, self.source, f"{self.path}[{i}]") for i, v in enumerate(self.value)]

    def named(self, what: str) -> Iterator[tuple[str, Node]]:
        """Entries of a mapping with free names."""
        if not isinstance(self.value, dict) or not self.value:
            self.fail(f"a mapping from names to {what}")
        for key in self.value:
            yield str(key), self.child(key)

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value:
            self.fail("a non-empty text")
        return self.value

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            self.fail("true or false")
        return self.value

    def whole(self, least: int = 0) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool) or self.value < least:
            self.fail(f"a whole number >= {least}")
        return self.value

    def quantity(self, example: str, least: float = 0.0) -> float:
        """A number, or one with a prefix and unit such as ``80GiB``, ``4.8TB/s``, ``400 TFLOP/s``."""
        number = self._parsed()
        if number is None or not math.isfinite(number) or number < least:
            self.fail(f"a number >= {least:g}, for instance {example}")
        return number

    def _parsed(self) -> float | None:
        if isinstance(self.value, (int, float)) and not isinstance(self.value, bool):
            return float(self.value)
        match = _QUANTITY.fullmatch(self.value.strip()) if isinstance(self.value, str) else None
        if match is None:
            return None
        prefix = (match["prefix"] or "").lower()
        return float(match["number"]) * (_BINARY[prefix] if prefix in _BINARY else _PREFIX[prefix])


def read_text(path: str | Path) -> str:
    """The file's text.

    Raises
    ------
    OperatorError
        It cannot be read, or is no UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise OperatorError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise OperatorError(f"{path}: not UTF-8 text (byte {e.start})") from e


def read_document(path: str | Path) -> Node:
    """A YAML or JSON file (by its ending ``.json``)."""
    text = read_text(path)
    try:
        value = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except json.JSONDecodeError as e:
        raise OperatorError(f"{path}: line {e.lineno}, column {e.colno}: not JSON: {e.msg}") from e
    except yaml.YAMLError as e:
        raise OperatorError(f"{path}: not YAML: {' '.join(str(e).split())}") from e
    return Node(value, str(path))


def read_table(path: str | Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()) -> Iterator[dict[str, Node]]:
    """Rows of a CSV file with a header line; cells become numbers where they look like them."""
    lines = csv.DictReader(read_text(path).splitlines())
    header = tuple(lines.fieldnames or ())
    unknown = [c for c in header if c not in columns + optional]
    missing = [c for c in columns if c not in header]
    if unknown or missing:
        wanted = ", ".join(columns) + "".join(f"[, {c}]" for c in optional)
        raise OperatorError(f"{path}: header: {','.join(header)!r}; expected the columns {wanted}")
    for row in lines:
        yield {c: Node(_cell(row[c]), str(path), f"line {lines.line_num}: {c}") for c in header}


def _cell(text: str | None) -> Any:
    for kind in (int, float):
        try:
            return kind(text or "")
        except ValueError:
            continue
    return text
