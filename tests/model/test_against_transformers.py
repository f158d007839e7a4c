"""The outside judge: logits and greedy tokens of every family against transformers on the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from concertina.workers.model.batch import Batch, Chunk
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..checkpoints import FAMILIES, VOCAB, make_checkpoint
from .loaded import Loaded

TOLERANCE = 1e-4  # of the logits' range


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, checkpoint_of: Callable[[str], Path]) -> tuple[PreTrainedModel, Loaded]:
    path = checkpoint_of(request.param)
    return judge_of(path), Loaded.open(path)


def judge_of(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    judge = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    judge.generation_config.eos_token_id = None  # so that it goes on as long as it is asked to
    return judge


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(4, VOCAB, (length,), generator=generator).tolist()


@torch.inference_mode()
def true_logits(judge: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    return judge(torch.tensor([list(tokens)])).logits[0].float()


@torch.inference_mode()
def true_greedy(judge: PreTrainedModel, tokens: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([list(tokens)])
    out = judge.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return out[0, len(tokens) :].tolist()


def assert_close(ours: Tensor, true: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == true.shape
    span = float(true.max() - true.min())
    assert float((ours - true).abs().max()) <= tolerance * span


@pytest.mark.parametrize(
    ("length", "chunk"),
    [(1, None), (2, None), (2, 1), (5, None), (5, 4), (63, None), (63, 1), (63, 7), (500, None), (500, 7), (500, 64)],
)
def test_logits(both: tuple[PreTrainedModel, Loaded], length: int, chunk: int | None) -> None:
    judge, ours = both
    tokens = prompt(length)
    assert_close(ours.logits(tokens, chunk), true_logits(judge, tokens))


@pytest.mark.parametrize("length", [1, 17])
def test_greedy_tokens_are_identical(both: tuple[PreTrainedModel, Loaded], length: int) -> None:
    judge, ours = both
    true = true_greedy(judge, prompt(length, seed=1), 64)
    assert len(set(true)) > 8, "the checkpoint repeats itself: this would show nothing"
    assert ours.greedy(prompt(length, seed=1), 64) == true


def test_a_mixed_batch(both: tuple[PreTrainedModel, Loaded]) -> None:
    """Fresh prefills, later chunks and decodes of very different lengths in one pass, only some logits wanted."""
    judge, ours = both
    cases = [
        (9, 0, True),
        (200, 199, True),
        (30, 12, True),
        (5, 0, False),
        (3, 2, True),
        (140, 139, True),
        (1, 0, True),
    ]
    chunks, expected, first = [], [], 0
    for seed, (length, context, wanted) in enumerate(cases):
        tokens = prompt(length, seed)
        blocks = [(first + i) * 13 % ours.kv.num_blocks for i in range(-(-length // ours.kv.block_tokens))]
        first += len(blocks)
        if context:
            ours.decoder.forward(Batch.of([Chunk(tokens[:context], 0, blocks, logits=False)]), ours.kv)
        chunks.append(Chunk(tokens[context:], context, blocks, wanted))
        if wanted:
            expected.append(true_logits(judge, tokens)[-1])
    assert first <= ours.kv.num_blocks
    assert_close(ours.decoder.forward(Batch.of(chunks), ours.kv), torch.stack(expected))


def test_logits_rows_are_in_the_order_asked(both: tuple[PreTrainedModel, Loaded]) -> None:
    judge, ours = both
    tokens = prompt(6)
    batch = Batch.of([Chunk(tokens, 0, ours.table(0, 6))])
    asked = Batch(batch.token_ids_T, batch.positions_T, [0, 6], [0], batch.block_tables, [4, 0, 5])
    assert_close(ours.decoder.forward(asked, ours.kv), true_logits(judge, tokens)[[4, 0, 5]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_to_the_truth_as_transformers(
    both: tuple[PreTrainedModel, Loaded], checkpoint_of: Callable[[str], Path], dtype: str
) -> None:
    judge, ours32 = both
    path = Path(ours32.files.path)
    tokens = prompt(40)
    true = true_logits(judge, tokens)
    theirs = true_logits(judge_of(path, getattr(torch, dtype)), tokens)
    ours = Loaded.open(path, dtype)
    span = float(true.max() - true.min())
    their_error = float((theirs - true).abs().mean()) / span
    for chunk in (None, 1):
        error = float((ours.logits(tokens, chunk) - true).abs().mean()) / span
        assert error < max(1.5 * their_error, 1e-3)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"sliding_window": 9}),
    ("mixtral", {"head_dim": 12, "tie_word_embeddings": True}),
    ("olmoe", {"clip_qkv": 0.8, "norm_topk_prob": True}),
    ("olmoe", {"attention_bias": True, "num_key_value_heads": 1}),
    ("qwen3_moe", {"attention_bias": True, "decoder_sparse_step": 2, "mlp_only_layers": []}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6, "norm_topk_prob": False}),
    ("qwen3_moe", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}}),
    (
        "qwen3_moe",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    (
        "olmoe",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ),
    (
        "deepseek_v3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "beta_fast": 16,
                "beta_slow": 2,
                "original_max_position_embeddings": 256,
            }
        },
    ),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "first_k_dense_replace": 0}),
    ("deepseek_v3", {"attention_bias": True, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    ("deepseek_v3", {"v_head_dim": 32, "routed_scaling_factor": 1.0}),
]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS, ids=[f"{f}-{'-'.join(o)}" for f, o in VARIANTS])
def test_every_option_of_a_family(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    path = make_checkpoint(family, tmp_path, seed=2, **overrides)
    judge, ours, tokens = judge_of(path), Loaded.open(path), prompt(41)
    true = true_logits(judge, tokens)
    for chunk in (None, 16, 1):
        assert_close(ours.logits(tokens, chunk), true)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", [{"max_shard_size": "40KB"}, {"stacked": True}], ids=["sharded", "stacked"])
def test_other_ways_to_store_the_same_checkpoint(tmp_path: Path, family: str, way: dict[str, Any]) -> None:
    path = make_checkpoint(family, tmp_path, **way)
    assert (path / "model.safetensors.index.json").exists() == ("max_shard_size" in way)
    tokens = prompt(20)
    assert_close(Loaded.open(path).logits(tokens), true_logits(judge_of(path), tokens))
