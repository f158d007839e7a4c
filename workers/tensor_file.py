"""Headers of safetensors files: where each tensor's bytes are, and in which file. Reads no tensor, needs no torch.

The format is described at https://github.com/huggingface/safetensors#format: eight bytes of little-endian header
length, a JSON header, then the data, into which ``data_offsets`` point.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from ..errors import InternalError, OperatorError

_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_SAMPLES = 16
_SAMPLE_BYTES = 4 << 10
DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Tells a file from another one that comes to have its path; a copy on another node is the same.

    Only samples of the data count, since reading all of it takes minutes: a change between them is not noticed.
    Training changes nearly every weight, and thus every sample; data of up to 64 KiB count as a whole.

    Parameters
    ----------
    data_start : int
        Where the header ends.
    digest : bytes
        Of the size, the header and the samples.
    """

    data_start: int
    digest: bytes

    @classmethod
    def of(cls, fd: int, data_start: int) -> FileIdentity:
        """Of an open file, whatever it holds; its position stays.

        Raises
        ------
        OSError
            It cannot be read.
        """
        file_bytes = os.fstat(fd).st_size
        seen = blake2b(struct.pack("<Q", file_bytes), digest_size=16)
        seen.update(_read_at(fd, 0, data_start))
        last = max(0, file_bytes - data_start - _SAMPLE_BYTES)
        for i in range(_SAMPLES):
            seen.update(_read_at(fd, data_start + last * i // (_SAMPLES - 1), _SAMPLE_BYTES))
        return cls(data_start, seen.digest())


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor, or some rows of one, in a file.

    Parameters
    ----------
    name : str
    file : str
        Path of the safetensors file.
    offset : int
        First byte within the file.
    nbytes : int
    dtype : str
        As safetensors spells it, a key of `DTYPE_BYTES`.
    shape : tuple of int
    identity : FileIdentity
        Of the file. All its tensors have the same object, so that it is pickled once with any number of them.
    """

    name: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    identity: FileIdentity

    def rows(self, start: int, end: int) -> TensorInfo:
        """Rows ``start`` to ``end`` of the first dimension, for instance some experts of a stacked tensor.

        Raises
        ------
        InternalError
            Rows outside the tensor.
        """
        if not self.shape or not 0 <= start <= end <= self.shape[0]:
            raise InternalError(f"tensor {self.name!r}: no rows {start}..{end} in shape {self.shape}")
        row_bytes = math.prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]
        return replace(
            self,
            offset=self.offset + start * row_bytes,
            nbytes=(end - start) * row_bytes,
            shape=(end - start, *self.shape[1:]),
        )

    def at(self, index: int) -> TensorInfo:
        """One row, without the first dimension.

        Raises
        ------
        InternalError
            No such row.
        """
        row = self.rows(index, index + 1)
        return replace(row, shape=row.shape[1:])


def read_header(path: str) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file, checked against the file's size.

    Raises
    ------
    OperatorError
        The file cannot be read, is no safetensors file, is truncated, or has a tensor of an unknown dtype or with
        a size that does not fit its shape. The message names file and tensor.
    """
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise OperatorError(
                    f"{path}: not a safetensors file or truncated: {file_bytes} bytes cannot hold "
                    f"a header of {header_bytes}"
                )
            header = file.read(header_bytes)
            identity = FileIdentity.of(file.fileno(), 8 + header_bytes)
    except OSError as e:
        raise OperatorError(f"{path}: cannot be read: {e.strerror}") from e
    return _parse(path, header, file_bytes, identity)


def _read_at(fd: int, offset: int, nbytes: int) -> bytes:
    """Fewer bytes only where the file ends."""
    found = bytearray()
    while len(found) < nbytes and (part := os.pread(fd, nbytes - len(found), offset + len(found))):
        found += part
    return bytes(found)


def _parse(path: str, header: bytes, file_bytes: int, identity: FileIdentity) -> dict[str, TensorInfo]:
    try:
        entries = json.loads(header)
    except ValueError as e:
        raise OperatorError(f"{path}: header: malformed JSON: {e}") from e
    if not isinstance(entries, dict):
        raise OperatorError(f"{path}: header: expected an object, got {type(entries).__name__}")
    return {
        name: _tensor(path, name, entry, file_bytes, identity)
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def _tensor(path: str, name: str, entry: Any, file_bytes: int, identity: FileIdentity) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        start, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as e:
        raise OperatorError(
            f"{path}: tensor {name!r}: expected dtype, shape and two data_offsets, got {entry!r}"
        ) from e
    if dtype not in DTYPE_BYTES:
        raise OperatorError(f"{path}: tensor {name!r}: dtype: expected one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if min(shape, default=0) < 0 or start < 0 or end - start != expected:
        raise OperatorError(
            f"{path}: tensor {name!r}: {dtype} of shape {shape} has {expected} bytes, data_offsets give {start}..{end}"
        )
    offset = identity.data_start + start
    if offset + expected > file_bytes:
        raise OperatorError(
            f"{path}: truncated: tensor {name!r} ends at byte {offset + expected}, the file has {file_bytes}"
        )
    return TensorInfo(name, path, offset, expected, dtype, shape, identity)
