"""Text files to one stream of byte tokens, and batches as a pure function of (seed, step)."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import OperatorError
from .config import Recipe
from .tokens import EOS

Tokens = npt.NDArray[np.uint16]

HELD_OUT_EVERY = 20
"""A file is held out if its SHA-256 is a multiple of this: about 5 % of the files."""

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text.

    Parameters
    ----------
    source : str
        Where the files are.
    train, held_out : array of uint16
        Files in the order of their hashes, each followed by `EOS`.
    train_files, held_out_files : tuple of str
        Names relative to ``source``.
    fingerprint : str
        SHA-256 over all contents in order: equal data, equal fingerprint.
    """

    source: str
    train: Tokens
    held_out: Tokens
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    fingerprint: str

    @property
    def held_out_text(self) -> bytes:
        """The held-out files' bytes, one behind the other, without separators."""
        return bytes(self.held_out[self.held_out != EOS].astype(np.uint8))


def standard_library() -> Path:
    """Where this Python's own sources are."""
    return Path(sysconfig.get_paths()["stdlib"])


def load_corpus(path: Path | None = None) -> Corpus:
    """Read every text file below ``path``; None means the standard library's ``.py`` files without its tests.

    A file's side is decided by the SHA-256 of its content alone, so equal files never fall on both sides, and empty
    files are left out.

    Raises
    ------
    OperatorError
        The directory does not exist, a file cannot be read, or one side would be empty.
    """
    root = standard_library() if path is None else path
    if not root.is_dir():
        raise OperatorError(f"data: {root} is not a directory")
    files = {name: _read(root / name) for name in _names(root, "*.py" if path is None else "*")}
    by_hash = sorted((hashlib.sha256(text).digest(), name) for name, text in files.items() if text)
    held_out = [name for digest, name in by_hash if int.from_bytes(digest, "big") % HELD_OUT_EVERY == 0]
    train = [name for digest, name in by_hash if int.from_bytes(digest, "big") % HELD_OUT_EVERY]
    if not train or not held_out:
        raise OperatorError(
            f"data: {root}: {len(by_hash)} non-empty text files give {len(train)} for training and {len(held_out)} "
            f"held out (1 in {HELD_OUT_EVERY}, by hash); both must have at least one: add files"
        )
    fingerprint = hashlib.sha256(b"".join(digest for digest, _ in by_hash)).hexdigest()
    sides = (_stream(files[n] for n in train), _stream(files[n] for n in held_out))
    return Corpus(str(root), *sides, tuple(train), tuple(held_out), fingerprint)


def _names(root: Path, pattern: str) -> list[str]:
    # Broken links count as files, so that they are not passed over in silence
    paths = (p.relative_to(root) for p in root.rglob(pattern) if p.is_file() or (p.is_symlink() and not p.exists()))
    return sorted(
        p.as_posix()
        for p in paths
        if not _SKIPPED_FOLDERS.intersection(p.parts[:-1]) and not any(part.startswith(".") for part in p.parts)
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise OperatorError(f"data: {path}: cannot be read: {e.strerror}") from e


def _stream(texts: Iterator[bytes]) -> Tokens:
    parts: list[Tokens] = []
    for text in texts:
        parts += [np.frombuffer(text, np.uint8).astype(np.uint16), np.array([EOS], np.uint16)]
    return np.concatenate(parts)


class Batches:
    """Rows of one training stream, each epoch in a fresh order.

    The stream is cut into windows of the step's sequence length; an epoch visits every window once, in an order and
    from an offset drawn from (seed, length, epoch). What a step reads depends on ``seed`` and ``step`` alone, so a
    resumed run, and later any number of workers, needs no other data position.
    """

    def __init__(self, stream: Tokens, recipe: Recipe, seed: int) -> None:
        if len(stream) <= 2 * recipe.seq_len:
            raise OperatorError(
                f"data: {len(stream)} training tokens are too few for seq_len {recipe.seq_len}: "
                f"expected more than {2 * recipe.seq_len}"
            )
        self._stream, self._recipe, self._seed = stream, recipe, seed
        self._order: tuple[tuple[int, int], npt.NDArray[np.int64]] | None = None

    def at(self, step: int) -> npt.NDArray[np.int64]:
        """Rows of ``step``: shape (batch_tokens / length, length + 1); targets are the inputs moved by one."""
        phase_start, length = self._recipe.phase_at(step)
        rows = self._recipe.batch_tokens // length
        first = (step - phase_start) * rows
        starts = [self._start(length, first + row) for row in range(rows)]
        return np.stack([self._stream[s : s + length + 1] for s in starts]).astype(np.int64)

    def _start(self, length: int, index: int) -> int:
        windows = (len(self._stream) - 1 - length) // length  # one less than fit, which leaves room for the offset
        epoch, position = divmod(index, windows)
        if self._order is None or self._order[0] != (length, epoch):
            self._order = ((length, epoch), self._draw(length, epoch, windows))
        return int(self._order[1][position])

    def _draw(self, length: int, epoch: int, windows: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng((self._seed, length, epoch))
        offset = rng.integers(length)
        return rng.permutation(windows) * length + offset
