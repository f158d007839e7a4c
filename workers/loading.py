"""Reading tensors from a checkpoint straight into page memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

from ..errors import InternalError, OperatorError
from .convert import check_convertible, convert
from .tensor_file import DTYPE_BYTES, FileIdentity, TensorInfo

_READ_BYTES = 16 << 20  # per system call, so that progress is seen
_CONVERT_ELEMENTS = 1 << 18  # 1 MiB of F32: stays in a core's cache between reading and writing

Progress = Callable[[int, int], None]
"""Called with bytes read so far and in all; from the loading thread, about every 16 MiB."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor (or some of its rows) and where its elements go, contiguously.

    Parameters
    ----------
    source : TensorInfo
        Use `TensorInfo.rows` and `TensorInfo.at` for parts of a tensor.
    key : str
        Extent to write to.
    dest_offset : int
        First byte within the extent; a multiple of the element size.
    dtype : str
        Wanted dtype, as safetensors spells it.
    """

    source: TensorInfo
    key: str
    dest_offset: int
    dtype: str

    @property
    def dest_bytes(self) -> int:
        """Bytes written into the extent."""
        return self.source.nbytes // DTYPE_BYTES[self.source.dtype] * DTYPE_BYTES[self.dtype]

    def check(self, extent_bytes: int) -> None:
        """Check the piece against its extent's size.

        Raises
        ------
        OperatorError
            The wanted dtype is unknown, or cannot be made from the tensor's.
        InternalError
            It lies outside the extent or is misaligned.
        """
        where = f"{self.source.file}: tensor {self.source.name!r}"
        if self.dtype != self.source.dtype:
            check_convertible(self.source.dtype, self.dtype, where)
        if self.dest_offset % DTYPE_BYTES[self.dtype]:
            raise InternalError(f"{where}: dest_offset {self.dest_offset} is no multiple of {DTYPE_BYTES[self.dtype]}")
        if self.dest_offset < 0 or self.dest_offset + self.dest_bytes > extent_bytes:
            raise InternalError(
                f"{where}: bytes {self.dest_offset}..{self.dest_offset + self.dest_bytes} lie outside extent "
                f"{self.key!r} of {extent_bytes} bytes"
            )


Segments = Callable[[str, int, int], Sequence[memoryview]]
"""``segments(key, offset, nbytes)``: the extent's memory for these bytes, in order."""


def load_pieces(pieces: Sequence[Piece], segments: Segments, progress: Progress | None = None) -> None:
    """Read every piece, in the order of files and offsets.

    Raises
    ------
    OperatorError
        A file cannot be opened, ends early, or is not the one any more whose header was read; names the file.
    InternalError
        It cannot be read, perhaps only now.
    """
    total, done = sum(piece.source.nbytes for piece in pieces), 0
    ordered = sorted(pieces, key=lambda p: (p.source.file, p.source.offset))
    for (path, identity), of_file in groupby(ordered, lambda p: (p.source.file, p.source.identity)):
        with _opened(path, identity) as fd:
            for piece in of_file:
                memory = segments(piece.key, piece.dest_offset, piece.dest_bytes)
                for nbytes in _read_piece(piece, fd, memory):
                    done += nbytes
                    if progress:
                        progress(done, total)


@contextmanager
def _opened(path: str, identity: FileIdentity) -> Iterator[int]:
    """The file, if it is the one that is meant, also when all has been read: it may be overwritten meanwhile."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as e:
        raise OperatorError(f"{path}: cannot be read: {e.strerror}") from e
    with file:
        try:
            _check_same(path, file.fileno(), identity)
            yield file.fileno()
            _check_same(path, file.fileno(), identity)
        except OSError as e:  # of a disk or a file server, perhaps only now
            raise InternalError(f"{path}: cannot be read: {e.strerror}") from e


def _check_same(path: str, fd: int, identity: FileIdentity) -> None:
    if FileIdentity.of(fd, identity.data_start) != identity:
        raise OperatorError(
            f"{path}: not the file that is served any more: it was replaced or changed since the deployment began, or "
            f"this node's copy is another; expected the former file; to serve other weights, start the deployment anew"
        )


def _read_piece(piece: Piece, fd: int, segments: Sequence[memoryview]) -> Iterator[int]:
    source = piece.source
    size, dest_size = DTYPE_BYTES[source.dtype], DTYPE_BYTES[piece.dtype]
    same = source.dtype == piece.dtype
    step = _READ_BYTES if same else _CONVERT_ELEMENTS * dest_size
    scratch = None if same else memoryview(bytearray(_CONVERT_ELEMENTS * size))
    offset = source.offset
    for segment in segments:
        for start in range(0, len(segment), step):
            out = segment[start : start + step]
            raw = out if scratch is None else scratch[: len(out) // dest_size * size]
            _fill(fd, raw, offset, source)
            if scratch is not None:
                convert(raw, source.dtype, out, piece.dtype)
            offset += len(raw)
            yield len(raw)


def _fill(fd: int, out: memoryview, offset: int, source: TensorInfo) -> None:
    while out:
        count = os.preadv(fd, [out], offset)
        if count == 0:
            raise OperatorError(
                f"{source.file}: tensor {source.name!r}: the file ends at byte {offset}, "
                f"expected to reach {source.offset + source.nbytes}"
            )
        out, offset = out[count:], offset + count
