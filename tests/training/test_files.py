"""Files are there whole or not at all."""

import errno

import pytest
from concertina.errors import OperatorError
from concertina.workers.training.files import replace_file, write_json
from concertina.workers.training.folder import read_record
from safetensors import SafetensorError


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "state"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(OperatorError, match="state: cannot be written"):
        replace_file(path, write)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_crash_before_the_first_record_leaves_a_usable_folder(tmp_path):
    class Crash(BaseException):
        pass

    def write(temporary):
        temporary.write_text("{")
        raise Crash

    with pytest.raises(Crash):
        replace_file(tmp_path / "training.json", write)
    assert read_record(tmp_path) is None


def test_a_file_in_the_folder_s_place_is_named(tmp_path):
    write_json(tmp_path / "out", {})
    with pytest.raises(OperatorError, match="out: expected a directory"):
        read_record(tmp_path / "out")
