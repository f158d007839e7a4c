"""The decoder's contract beyond its numbers: idle passes, padding, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from concertina.errors import InternalError, OperatorError
from concertina.workers.model.batch import Batch, Chunk
from concertina.workers.model.decoder import Decoder
from concertina.workers.model.kv import KVCache
from concertina.workers.model.rope import RopeTable
from torch import Tensor

from ..checkpoints import FAMILIES, VOCAB
from .loaded import Loaded


@pytest.fixture(params=FAMILIES)
def loaded(request: pytest.FixtureRequest, checkpoint_of: Callable[[str], Path]) -> Loaded:
    return Loaded.open(checkpoint_of(request.param))


def test_without_tokens_every_moe_layer_is_still_called(loaded: Loaded) -> None:
    config, calls = loaded.files.config, []

    def experts(layer: int, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        calls.append(layer)
        assert (x_TH.shape, x_TH.dtype) == ((0, config.hidden_size), torch.float32)
        assert (ids_TK.shape, ids_TK.dtype) == ((0, config.top_k), torch.int64)
        assert (weights_TK.shape, weights_TK.dtype) == ((0, config.top_k), torch.float32)
        return x_TH

    loaded.decoder.experts = experts
    logits = loaded.decoder.forward(Batch.of([]), loaded.kv)
    assert (logits.shape, logits.dtype) == ((0, VOCAB), torch.float32)
    assert calls == list(range(len(config.moe_layers)))


def test_local_experts_take_no_tokens(loaded: Loaded) -> None:
    assert loaded.decoder.forward(Batch.of([]), loaded.kv).shape == (0, VOCAB)


def test_the_next_decoder_of_a_process_need_not_compute_rotary_tables(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a running sequence would have everybody wait in the first step behind a switch."""
    batch = Batch.of([Chunk([5, 6, 7], 0, [0], True)])
    expected = loaded.decoder.forward(batch, loaded.kv)
    monkeypatch.setattr(RopeTable, "_of", lambda *_: pytest.fail("computed anew"))
    later = Loaded.open(Path(loaded.files.path))
    assert torch.equal(later.decoder.forward(batch, later.kv), expected)


def test_no_logits_wanted(loaded: Loaded) -> None:
    logits = loaded.decoder.forward(Batch.of([Chunk([5, 6, 7], 0, [0], logits=False)]), loaded.kv)
    assert logits.shape == (0, VOCAB)


def test_only_the_sequences_own_blocks_are_written_and_read(loaded: Loaded) -> None:
    """M5: a page that becomes KV may hold anything, NaN included; no other sequence's block is touched."""
    tokens = [9, 8, 7, 6, 5, 4]
    clean = loaded.logits(tokens, chunk=1)[-1]
    for layer in loaded.kv.layers:
        layer.fill_(float("nan"))
    own, other = [3, 11], [4]
    for position, token in enumerate(tokens):
        chunks = [Chunk([token], position, own)]
        if position == 0:
            chunks.append(Chunk([33, 34], 0, other, logits=False))
        logits = loaded.decoder.forward(Batch.of(chunks), loaded.kv)
    for layer in loaded.kv.layers:
        assert layer.isfinite().any(-1).any(-1).nonzero().flatten().tolist() == [3, 4, 11]
    torch.testing.assert_close(logits[0], clean, rtol=1e-4, atol=1e-4)


def test_a_short_block_table_is_refused(loaded: Loaded) -> None:
    with pytest.raises(InternalError, match="sequence 1: 5 tokens need 2 KV blocks, its table has 1"):
        loaded.decoder.forward(Batch.of([Chunk([1], 0, [0]), Chunk([1], 4, [1])]), loaded.kv)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_blocks_may_be_padded_to_whole_pages(checkpoint_of: Callable[[str], Path], family: str) -> None:
    loaded = Loaded.open(checkpoint_of(family))
    config = loaded.files.config
    stride = 4096 * -(-KVCache.block_bytes(config, "float32", 4) // 4096)
    buffer = torch.full((64 + 9 * stride,), 255, dtype=torch.uint8)  # all bits set is NaN
    kv = KVCache(config, "float32", buffer[64:], 9, 4, stride)
    tokens = list(range(10, 31))
    padded = Loaded(loaded.files, loaded.decoder, kv)
    padded.table = lambda first, count: [8, 2, 5, 0, 7, 1]  # type: ignore[method-assign]
    assert buffer[:64].unique().tolist() == [255]
    torch.testing.assert_close(padded.logits(tokens, 5), loaded.logits(tokens, 5), rtol=1e-4, atol=1e-5)


def test_kv_caches_that_cannot_be_are_refused(loaded: Loaded) -> None:
    config = loaded.files.config
    needed = KVCache.block_bytes(config, "float32", 4)
    with pytest.raises(OperatorError, match=f"KV block_bytes: expected a multiple of 4, at least {needed}; got 8"):
        KVCache(config, "float32", torch.zeros(4096, dtype=torch.uint8), 1, 4, 8)
    with pytest.raises(OperatorError, match=f"KV buffer: expected 2 blocks x {needed} bytes, got {needed}"):
        KVCache(config, "float32", torch.zeros(needed, dtype=torch.uint8), 2, 4)


def test_weights_are_read_not_copied(loaded: Loaded) -> None:
    """Trunk pages are shared by all workers of a node: the decoder must see them change."""
    before = loaded.logits([5, 6, 7])[-1].clone()
    decoder: Decoder = loaded.decoder
    decoder._head.mul_(2.0)
    torch.testing.assert_close(loaded.logits([5, 6, 7])[-1], 2 * before)
