"""Where bytes lie. Invariants M3 and M4 of docs/invariants.md."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from concertina.errors import OperatorError
from concertina.workers.families import load_config
from concertina.workers.families.base import DTYPE_BYTES
from concertina.workers.families.layout import (
    ALIGNMENT,
    Placed,
    expert_bytes,
    expert_layout,
    kv_token_bytes,
    place_all,
    trunk_bytes,
    trunk_layout,
)
from concertina.workers.model.views import expert_views, trunk_views
from concertina.workers.model_files import ModelFiles
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..checkpoints import FAMILIES, make_checkpoint
from .loaded import Loaded


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", list(DTYPE_BYTES))
def test_extents_are_filled_without_gap_or_overlap(
    checkpoint_of: Callable[[str], Path], family: str, dtype: str
) -> None:
    """M3: every byte of every tensor's slot is written by exactly one piece; slots are aligned and disjoint."""
    files = ModelFiles.open(checkpoint_of(family), dtype)
    config = files.config
    written: dict[str, list[tuple[int, int]]] = {}
    for piece in place_all(config, files.checkpoint, dtype):
        end = piece.offset + math.prod(piece.spec.shape) * DTYPE_BYTES[piece.dtype]
        written.setdefault(piece.key, []).append((piece.offset, end))
    assert len(written) == 1 + len(config.moe_layers) * config.experts
    for key, parts in written.items():
        layout = trunk_layout(config, dtype) if key == "trunk" else expert_layout(config, dtype)
        slots = sorted((slot.offset, slot.offset + slot.nbytes) for slot in layout.slots.values())
        assert all(begin % ALIGNMENT == 0 for begin, _ in slots)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(slots))
        assert slots[-1][1] <= layout.nbytes
        assert _joined(parts) == _joined(slots)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        assert not joined or joined[-1][1] <= begin, "two pieces write the same bytes"
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_add_up_to_the_checkpoint(checkpoint_of: Callable[[str], Path], family: str) -> None:
    """M4: extents hold the checkpoint's bytes plus less than one alignment per tensor."""
    path = checkpoint_of(family)
    config = load_config(path)
    with safe_open(path / "model.safetensors", "pt") as file:
        total = sum(math.prod(file.get_slice(name).get_shape()) * 4 for name in file.keys())  # noqa: SIM118
    experts = len(config.moe_layers) * config.experts
    held = trunk_bytes(config, "float32") + experts * expert_bytes(config, "float32")
    assert total <= held < total + ALIGNMENT * (len(trunk_layout(config, "float32").slots) + 2 * experts)


def test_kv_bytes_per_token(checkpoint_of: Callable[[str], Path]) -> None:
    mixtral, deepseek = load_config(checkpoint_of("mixtral")), load_config(checkpoint_of("deepseek_v3"))
    assert kv_token_bytes(mixtral, "bfloat16") == 3 * 2 * (2 * 2 * 8)
    assert kv_token_bytes(deepseek, "float32") == 3 * 4 * (24 + 8)  # latent and rope key, whatever the heads


def test_views_share_memory_and_parts_are_adjacent(checkpoint_of: Callable[[str], Path]) -> None:
    config = load_config(checkpoint_of("qwen3_moe"))
    extent = torch.zeros(trunk_bytes(config, "bfloat16"), dtype=torch.uint8)
    qkv = trunk_views(extent, config, "bfloat16")["0.qkv"]
    assert qkv.shape == ((6 + 2 + 2) * 16, 40)
    qkv[-1, -1] = 1.0
    slot = trunk_layout(config, "bfloat16").slots["0.qkv"]
    assert extent[slot.offset : slot.offset + slot.nbytes].nonzero().numel()
    one = torch.zeros(expert_bytes(config, "float16"), dtype=torch.uint8)
    w13, w2 = expert_views(one, config, "float16")
    assert (w13.shape, w2.shape, w2.dtype) == ((48, 40), (40, 24), torch.float16)


def test_an_unknown_dtype_is_refused(checkpoint_of: Callable[[str], Path]) -> None:
    with pytest.raises(OperatorError, match="dtype: expected one of float32"):
        expert_bytes(load_config(checkpoint_of("olmoe")), "int8")


def test_routers_that_choose_in_float32_keep_float32(checkpoint_of: Callable[[str], Path]) -> None:
    slots = trunk_layout(load_config(checkpoint_of("deepseek_v3")), "bfloat16").slots
    assert {slots["1.router"].dtype, slots["1.router_bias"].dtype} == {"float32"}
    assert slots["1.gate_up"].dtype == "bfloat16"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(family, tmp_path)
    tensors = load_file(path / "model.safetensors")
    expert = next(name for name in sorted(tensors) if ".experts.3." in name)
    for name in ("model.norm.weight", "model.layers.2.self_attn.o_proj.weight", expert):
        save_file({k: v for k, v in tensors.items() if k != name}, path / "model.safetensors")
        with pytest.raises(OperatorError, match=name):
            Loaded.open(path)
        save_file({**tensors, name: tensors[name][:-1].clone()}, path / "model.safetensors")
        with pytest.raises(OperatorError, match=f"{name}.*expected shape"):
            Loaded.open(path)


def test_a_configuration_that_does_not_fit_the_tensors_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint("olmoe", tmp_path)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, "num_experts": 8}))
    with pytest.raises(OperatorError, match=r"gate\.weight.*expected shape \(8, 48\)"):
        Loaded.open(path)


def test_pieces_of_stacked_experts_are_slices(tmp_path: Path) -> None:
    path = make_checkpoint("qwen3_moe", tmp_path, stacked=True)
    files = ModelFiles.open(path)
    placed = [p for p in place_all(files.config, files.checkpoint, "float32") if p.key == "expert/1/4"]
    assert [(p.spec.name, p.index) for p in placed] == [
        ("model.layers.2.mlp.experts.gate_up_proj", 4),
        ("model.layers.2.mlp.experts.down_proj", 4),
    ]
    assert all(isinstance(p, Placed) for p in placed)
