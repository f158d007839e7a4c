"""A Hugging Face checkpoint directory: its ``config.json`` and where every tensor is. No tensor is read here."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OperatorError
from .tensor_file import TensorInfo, read_header

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Parameters
    ----------
    path : str
        The directory.
    config : mapping
        ``config.json`` as it stands.
    tensors : mapping of str to TensorInfo
        By name.
    """

    path: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read ``config.json`` and the headers of ``model.safetensors``, or of the shards its index names.

        Raises
        ------
        OperatorError
            A directory or file is missing, malformed or truncated, or the index names a shard or a tensor that
            is not there. The message begins with the path concerned.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise OperatorError(f"{folder}: expected a checkpoint directory, found none")
        config = _read_object(folder / "config.json")
        if (folder / _SINGLE).exists():
            return cls(str(folder), config, read_header(str(folder / _SINGLE)))
        if (folder / _INDEX).exists():
            return cls(str(folder), config, _read_shards(folder))
        raise OperatorError(f"{folder}: expected {_SINGLE} or {_INDEX}, found neither")

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> TensorInfo:
        """Where a tensor is.

        Raises
        ------
        OperatorError
            No such tensor; the message offers the names that are most alike.
        """
        if name in self.tensors:
            return self.tensors[name]
        alike = difflib.get_close_matches(name, self.tensors, n=3)
        hint = f"; most alike: {', '.join(alike)}" if alike else ""
        raise OperatorError(f"{self.path}: tensor {name!r}: not in this checkpoint{hint}")

    def expect(self, name: str, shape: Sequence[int]) -> TensorInfo:
        """`tensor`, with the shape that the model needs.

        Raises
        ------
        OperatorError
            No such tensor, or another shape.
        """
        info = self.tensor(name)
        if info.shape != tuple(shape):
            raise OperatorError(f"{info.file}: tensor {name!r}: expected shape {tuple(shape)}, found {info.shape}")
        return info


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise OperatorError(f"{path}: cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise OperatorError(f"{path}: malformed JSON: {e}") from e
    if not isinstance(value, dict):
        raise OperatorError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    index = folder / _INDEX
    names = _read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise OperatorError(f"{index}: weight_map: expected an object of tensor name to file name")
    shards: dict[str, dict[str, TensorInfo]] = {}
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise OperatorError(f"{index}: weight_map: file {shard!r} is not in {folder}")
        shards[shard] = read_header(str(folder / shard))
    for name, shard in names.items():
        if name not in shards[shard]:
            raise OperatorError(f"{folder / shard}: tensor {name!r}: named by {_INDEX}, not in the file")
    return {name: shards[shard][name] for name, shard in names.items()}
