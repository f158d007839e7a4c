from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from concertina.errors import InternalError, OperatorError
from concertina.workers.checkpoint import Checkpoint
from concertina.workers.tensor_file import FileIdentity, TensorInfo, read_header
from safetensors.torch import save_file

from .tensor_files import raw, write_checkpoint, write_header

A = torch.arange(24, dtype=torch.float32).view(4, 3, 2)
B = torch.arange(5, dtype=torch.bfloat16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "toy", {"model.safetensors": {"a": A, "b": B}})


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "toy", {"x-1.safetensors": {"a": A}, "x-2.safetensors": {"b": B}})


def read(info: TensorInfo) -> bytes:
    return Path(info.file).read_bytes()[info.offset : info.offset + info.nbytes]


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_tensors_are_found(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint.open(request.getfixturevalue(kind))
    assert checkpoint.config == {"model_type": "toy"}
    assert set(checkpoint.tensors) == {"a", "b"}
    assert "a" in checkpoint
    assert "c" not in checkpoint
    info = checkpoint.expect("a", [4, 3, 2])
    assert (info.dtype, info.shape, read(info)) == ("F32", (4, 3, 2), raw(A))
    assert read(checkpoint.tensor("b")) == raw(B)


def test_files_of_the_safetensors_library_are_read(tmp_path: Path) -> None:
    tensors = {"a": A, "b": B, "empty": torch.zeros(0, 7), "scalar": torch.tensor(3, dtype=torch.int64)}
    save_file(tensors, tmp_path / "f.safetensors")
    header = read_header(str(tmp_path / "f.safetensors"))
    assert {name: (info.shape, read(info)) for name, info in header.items()} == {
        name: (tuple(t.shape), raw(t)) for name, t in tensors.items()
    }


def test_rows_of_a_stacked_tensor(folder: Path) -> None:
    info = Checkpoint.open(folder).tensor("a")
    assert (info.rows(1, 3).shape, read(info.rows(1, 3))) == ((2, 3, 2), raw(A[1:3]))
    assert (info.at(2).shape, read(info.at(2))) == ((3, 2), raw(A[2]))
    assert read(info.at(3).rows(1, 2)) == raw(A[3, 1:2])
    assert info.rows(2, 2).nbytes == 0
    for start, end in ((-1, 2), (3, 5), (3, 2)):
        with pytest.raises(InternalError, match="no rows"):
            info.rows(start, end)
    with pytest.raises(InternalError, match="no rows"):
        info.at(0).at(0).at(0).rows(0, 1)


def test_a_file_is_known_by_what_it_holds(tmp_path: Path) -> None:
    """However large the data is against its samples: the first and last byte count, and every byte of a small file."""
    for count in (0, 1, 1000, 65_536, 300_000):
        tensors = {"w": torch.zeros(count, dtype=torch.uint8), "end": torch.zeros(4, dtype=torch.uint8)}
        file = write_checkpoint(tmp_path / "toy", {"model.safetensors": tensors}) / "model.safetensors"
        first, whole = read_header(str(file))["w"], file.read_bytes()
        start, changed = first.offset, {0, 8, len(whole) - 1}
        changed |= set(range(start, len(whole), 97 if len(whole) - start <= 65_536 else len(whole)))
        for at in changed - {0}:  # the header's length makes it another file's
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with file.open("rb") as f:
                assert FileIdentity.of(f.fileno(), start) != first.identity, (count, at)
        for other in (whole + b"\0", whole[:-1], b""):
            file.write_bytes(other)
            with file.open("rb") as f:
                assert FileIdentity.of(f.fileno(), start) != first.identity, (count, len(other))
        file.write_bytes(whole)
        assert read_header(str(file))["w"] == first


def test_an_identity_is_pickled_once_for_all_tensors_of_a_file(folder: Path) -> None:
    info = Checkpoint.open(folder).tensor("a")
    parts = [info.at(n % 4).rows(0, n % 3) for n in range(100)]
    packed = pickle.dumps(parts)
    assert packed.count(info.identity.digest) == 1
    assert pickle.loads(packed) == parts


def test_a_missing_tensor_and_a_wrong_shape_are_named(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(OperatorError, match="'aa': not in this checkpoint; most alike: a"):
        checkpoint.tensor("aa")
    with pytest.raises(
        OperatorError, match=r"model.safetensors: tensor 'a': expected shape \(3, 4, 2\), found \(4, 3, 2\)"
    ):
        checkpoint.expect("a", (3, 4, 2))


def test_missing_parts_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(OperatorError, match="gone: expected a checkpoint directory"):
        Checkpoint.open(tmp_path / "gone")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OperatorError, match=r"expected model.safetensors or model.safetensors.index.json"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(OperatorError, match=r"config.json: cannot be read: No such file"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "malformed JSON"), ("[1]", "expected a JSON object, got list"), ("\xff", "malformed JSON")],
)
def test_a_malformed_config_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(OperatorError, match=f"config.json: {message}"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("kept", [0, 7, 8, 30, -1, -50])
def test_a_truncated_file_is_named(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    message = f"truncated: tensor 'b' ends at byte {len(whole)}, the file has" if kept == -1 else "truncated"
    with pytest.raises(OperatorError, match=f"model.safetensors: .*{message}"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "header: malformed JSON"),
        ([1], "header: expected an object, got list"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "tensor 'a': expected dtype, shape and two data_offsets"),
        ({"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 4]}}, "tensor 'a': expected dtype, shape"),
        ({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, "tensor 'a': expected dtype, shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, "tensor 'a': expected dtype, shape"),
        ({"a": [1]}, "tensor 'a': expected dtype, shape"),
        (
            {"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}},
            "tensor 'a': dtype: expected one of .* got 'F4'",
        ),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "tensor 'a': F32 of shape .* 8 bytes, .* 0..4"),
        ({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, "tensor 'a': F32 of shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "tensor 'a': F32 of shape"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [8, 20]}}, "truncated: tensor 'a' ends at byte"),
    ],
)
def test_a_malformed_header_is_named(folder: Path, header: Any, message: str) -> None:
    write_header(folder / "model.safetensors", header, b"\0" * 16)
    with pytest.raises(OperatorError, match=f"model.safetensors: {message}"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map: expected an object"),
        ({"weight_map": {"a": 1}}, "weight_map: expected an object"),
        ({"weight_map": {"a": "x-3.safetensors"}}, "weight_map: file 'x-3.safetensors' is not in"),
        ({"weight_map": {"a": "../toy/x-1.safetensors"}}, "weight_map: file '../toy/x-1.safetensors' is not in"),
        ({"weight_map": {"a": "x-2.safetensors"}}, "x-2.safetensors: tensor 'a': named by .*index.json, not in"),
    ],
)
def test_a_wrong_index_is_named(sharded: Path, index: Any, message: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OperatorError, match=message):
        Checkpoint.open(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    file = sharded / "x-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OperatorError, match=r"x-2.safetensors: truncated: tensor 'b'"):
        Checkpoint.open(sharded)
