"""The output folder: whose it is, what was trained there, and whether that is finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import OperatorError
from .config import TrainConfig
from .data import Corpus
from .export import FILES
from .files import read_json, write_json
from .state import STATE

RECORD = "training.json"
_FORMAT = "concertina-training-1"


@dataclass(frozen=True)
class RunRecord:
    """Content of ``training.json``; ``summary`` is None until the run is finished."""

    config: TrainConfig
    fingerprint: str
    source: str
    summary: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        data = {"source": self.source, "fingerprint": self.fingerprint}
        record = {"format": _FORMAT, "config": self.config.to_dict(), "data": data, "summary": self.summary}
        write_json(folder / RECORD, record)


def read_record(folder: Path) -> RunRecord | None:
    """The folder's record; None where the folder does not exist or is empty.

    Raises
    ------
    OperatorError
        The folder holds something that this trainer did not write, or a damaged record.
    """
    path = folder / RECORD
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise OperatorError(f"{folder}: expected a directory")
    if not path.exists():
        if any(p.suffix != ".tmp" for p in folder.iterdir()):  # a crash may leave the record's temporary file
            raise OperatorError(f"{folder}: holds files that concertina train did not write; choose an empty directory")
        return None
    record = read_json(path)
    data, summary = record.get("data"), record.get("summary")
    if record.get("format") != _FORMAT or not isinstance(data, dict) or not isinstance(record.get("config"), dict):
        raise OperatorError(f"{path}: expected a record of format {_FORMAT!r}, got {record.get('format')!r}")
    config = TrainConfig.from_dict(record["config"], f"{path}: config")
    return RunRecord(config, str(data.get("fingerprint")), str(data.get("source")), summary)


def claim(folder: Path, config: TrainConfig, corpus: Corpus, resume: bool) -> RunRecord:
    """Make ``folder`` the place of this run: take over the same run's record, or write a new one.

    Raises
    ------
    OperatorError
        The folder is foreign, or holds another run and ``resume`` does not allow to discard it.
    """
    record = read_record(folder)
    if record is not None and not resume:
        _discard(folder)
        record = None
    if record is None:
        _create(folder)
        record = RunRecord(config, corpus.fingerprint, corpus.source)
        record.write(folder)
    _check_same(folder, record, config, corpus)
    return record


def _check_same(folder: Path, record: RunRecord, config: TrainConfig, corpus: Corpus) -> None:
    differences = record.config.differences(config)
    if record.fingerprint != corpus.fingerprint:
        differences.append(f"data: the contents of {record.source} -> those of {corpus.source}")
    if differences:
        raise OperatorError(
            f"{folder}: holds a run with other settings ({'; '.join(differences)}); "
            f"repeat its settings, choose another directory, or discard it with --no-resume"
        )


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OperatorError(f"{folder}: cannot be created: {e.strerror}") from e


def _discard(folder: Path) -> None:
    """Remove the files that a run writes, and no others; the record goes last."""
    for name in (*FILES, STATE, RECORD):
        (folder / name).unlink(missing_ok=True)
