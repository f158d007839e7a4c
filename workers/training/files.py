"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...errors import OperatorError


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk and rename it to ``path``.

    Raises
    ------
    OperatorError
        The folder is not writable or the disk is full; ``path`` is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as e:
        temporary.unlink(missing_ok=True)
        raise OperatorError(f"{path}: cannot be written: {e}") from e


def write_json(path: Path, data: Any) -> None:
    """`replace_file` with indented JSON."""
    text = json.dumps(data, indent=2) + "\n"
    replace_file(path, lambda p: _write_text(p, text))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; anything else is an `OperatorError` that names the file."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise OperatorError(f"{path}: expected a readable JSON object: {e}") from e
    if not isinstance(data, dict):
        raise OperatorError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
