"""Reading config.json: both of transformers' spellings, and what is refused with which words."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from concertina.errors import OperatorError
from concertina.workers.families import SUPPORTED, GqaAttention, MlaAttention, load_config, read_config

from ..checkpoints import FAMILIES


@pytest.fixture
def fields_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str], dict[str, Any]]:
    return lambda family: json.loads((checkpoint_of(family) / "config.json").read_text())


def test_numbers_of_each_family(checkpoint_of: Callable[[str], Path]) -> None:
    mixtral, olmoe, qwen, deepseek = (load_config(checkpoint_of(family)) for family in FAMILIES)
    assert mixtral.attention == GqaAttention(6, 2, 8)
    assert (mixtral.experts, mixtral.top_k, mixtral.expert_intermediate, mixtral.rope.theta) == (5, 2, 40, 1e6)
    assert olmoe.attention == GqaAttention(3, 3, 16, qk_norm="full")
    assert not olmoe.router.normalise
    assert qwen.attention == GqaAttention(6, 2, 16, qk_norm="head")
    assert (qwen.moe_layers, qwen.dense_intermediate) == ((0, 2), 56)
    assert deepseek.attention == MlaAttention(3, 20, 24, 16, 8, 12)
    assert (deepseek.moe_layers, deepseek.shared_intermediate, deepseek.rope.interleaved) == ((1, 2), 48, True)
    assert (deepseek.router.kind, deepseek.router.groups, deepseek.router.scale) == ("sigmoid", 3, 2.5)
    for config in (mixtral, olmoe, qwen, deepseek):
        assert (config.dtype, config.bos_id, config.eos_ids, config.max_positions) == ("float32", 0, (1,), 1024)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling", [None, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}])
def test_older_spelling_means_the_same(
    fields_of: Callable[[str], dict[str, Any]], family: str, scaling: dict[str, Any] | None
) -> None:
    new = fields_of(family)
    old = dict(new)
    theta = old.pop("rope_parameters")["rope_theta"]
    old |= {"torch_dtype": old.pop("dtype"), "rope_theta": theta, "rope_scaling": scaling}
    if "num_local_experts" in old and family == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    if scaling is not None:
        new["rope_parameters"] = {**scaling, "rope_type": scaling["type"], "rope_theta": theta}
    assert read_config(old) == read_config(new)


def test_what_ends_a_sequence_by_the_generation_config(tmp_path: Path, fields_of: Callable[[str], Any]) -> None:
    """As transformers' `generate` ends: Qwen3's chats have a second id there, some checkpoints their only one."""
    path = tmp_path / "generation_config.json"
    for ids, generation, expected in ((1, [1, 5], (1, 5)), (None, 7, (7,)), (1, None, (1,))):
        (tmp_path / "config.json").write_text(json.dumps({**fields_of("olmoe"), "eos_token_id": ids}))
        path.write_text(json.dumps({"eos_token_id": generation}))
        assert load_config(tmp_path).eos_ids == expected
    for text, says in (
        ("{", "readable JSON"),
        ('{"eos_token_id": "x"}', "eos_token_id: expected"),
        ('{"eos_token_id": [1000000]}', "vocab_size"),
    ):
        path.write_text(text)
        with pytest.raises(OperatorError, match=says) as error:
            load_config(tmp_path)
        assert str(error.value).startswith(str(path))


def test_several_end_of_sequence_ids(fields_of: Callable[[str], dict[str, Any]]) -> None:
    fields = fields_of("olmoe")
    assert read_config({**fields, "eos_token_id": [5, 3]}).eos_ids == (5, 3)
    assert read_config({**fields, "eos_token_id": None}).eos_ids == ()


@pytest.mark.parametrize("architectures", [None, [], "OlmoeForCausalLM", ["LlamaForCausalLM"], [7], [["x"]]])
def test_unsupported_architectures_are_refused_with_the_supported(architectures: Any) -> None:
    with pytest.raises(OperatorError) as error:
        read_config({"architectures": architectures}, "model/config.json")
    assert str(error.value).startswith("model/config.json: architectures: expected")
    assert all(name in str(error.value) for name in SUPPORTED)


BAD = [
    ("mixtral", "hidden_size", None),
    ("mixtral", "hidden_size", 50),
    ("mixtral", "num_key_value_heads", 4),
    ("mixtral", "num_local_experts", "8"),
    ("mixtral", "num_experts_per_tok", 6),
    ("mixtral", "sliding_window", 0),
    ("mixtral", "vocab_size", True),
    ("olmoe", "num_hidden_layers", 0),
    ("olmoe", "num_experts", -1),
    ("olmoe", "clip_qkv", -2.0),
    ("olmoe", "hidden_act", "gelu"),
    ("olmoe", "dtype", "float8_e4m3fn"),
    ("olmoe", "norm_topk_prob", "yes"),
    ("olmoe", "rms_norm_eps", 0),
    ("olmoe", "rms_norm_eps", float("nan")),
    ("olmoe", "eos_token_id", [1, "2"]),
    ("olmoe", "quantization_config", {"quant_method": "fp8"}),
    ("olmoe", "rope_parameters", [1]),
    ("olmoe", "rope_parameters.rope_type", "longrope"),
    ("olmoe", "rope_parameters.rope_theta", -1),
    ("qwen3_moe", "moe_intermediate_size", None),
    ("qwen3_moe", "decoder_sparse_step", 0),
    ("qwen3_moe", "mlp_only_layers", [0.5]),
    ("qwen3_moe", "intermediate_size", None),
    ("qwen3_moe", "max_position_embeddings", 1.5),
    ("deepseek_v3", "n_group", 5),
    ("deepseek_v3", "topk_group", 4),
    ("deepseek_v3", "num_experts_per_tok", 5),
    ("deepseek_v3", "kv_lora_rank", None),
    ("deepseek_v3", "scoring_func", "softmax"),
    ("deepseek_v3", "topk_method", "greedy"),
    ("deepseek_v3", "qk_rope_head_dim", 7),
    ("deepseek_v3", "first_k_dense_replace", -1),
    ("olmoe", "partial_rotary_factor", 0.05),
    ("mixtral", "head_dim", 9),
]


@pytest.mark.parametrize(("family", "field", "value"), BAD, ids=[f"{f}-{n}-{v}" for f, n, v in BAD])
def test_a_bad_field_is_named(fields_of: Callable[[str], dict[str, Any]], family: str, field: str, value: Any) -> None:
    fields = fields_of(family)
    outer, _, inner = field.partition(".")
    if inner:
        fields[outer] = {**fields[outer], inner: value}
    else:
        fields[outer] = value
    with pytest.raises(OperatorError) as error:
        read_config(fields, "here/config.json")
    assert str(error.value).startswith("here/config.json: ")
    assert f"{inner or outer}: expected" in str(error.value)


@pytest.mark.parametrize("text", [None, "", "[]", "{", "\udcff"])
def test_an_unreadable_file_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(OperatorError, match=str(path)):
        load_config(tmp_path)


def test_families_need_no_torch() -> None:
    code = "import concertina.workers.families.layout, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
