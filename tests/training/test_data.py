"""Corpus, batches, schedule and held-out bits."""

import dataclasses
import gzip
import math

import numpy as np
import pytest
import torch
from concertina.errors import OperatorError
from concertina.workers.training.balance import max_over_mean, router_stats
from concertina.workers.training.config import ModelShape, Recipe, TrainConfig
from concertina.workers.training.data import Batches, load_corpus
from concertina.workers.training.evaluate import gzip_bits, held_out_bits, xz_bits
from concertina.workers.training.model import Decoder
from concertina.workers.training.optim import rate
from concertina.workers.training.tokens import EOS, VOCAB
from hypothesis import given
from hypothesis import strategies as st

from .conftest import write_corpus


def test_split_depends_on_contents_alone(tmp_path):
    a, b = write_corpus(tmp_path / "a"), write_corpus(tmp_path / "b" / "deeper")
    (b / "f00.txt").rename(b / "zz.txt")
    one, two = load_corpus(a), load_corpus(tmp_path / "b")
    assert one.fingerprint == two.fingerprint
    assert np.array_equal(one.train, two.train)
    assert np.array_equal(one.held_out, two.held_out)
    assert 0 < len(one.held_out_files) < len(one.train_files)
    assert one.held_out_text == b"".join((a / n).read_bytes() for n in one.held_out_files)


def test_equal_files_are_on_one_side_and_tests_on_none(corpus_dir):
    before = load_corpus(corpus_dir)
    for name in before.held_out_files:
        (corpus_dir / f"copy_of_{name}").write_bytes((corpus_dir / name).read_bytes())
    (corpus_dir / "tests").mkdir()
    (corpus_dir / "tests" / "t.txt").write_text("x" * 99)
    after = load_corpus(corpus_dir)
    assert after.train_files == before.train_files
    assert len(after.held_out_files) == 2 * len(before.held_out_files)


def test_standard_library_is_the_default():
    corpus = load_corpus()
    names = (*corpus.train_files, *corpus.held_out_files)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any("test" in name.split("/")[:-1] for name in names)


def test_bad_folders_are_named(tmp_path, corpus_dir):
    with pytest.raises(OperatorError, match="missing is not a directory"):
        load_corpus(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OperatorError, match="0 non-empty text files"):
        load_corpus(tmp_path / "empty")
    (corpus_dir / "dangling.txt").symlink_to(corpus_dir / "loop.txt")
    (corpus_dir / "loop.txt").symlink_to(corpus_dir / "dangling.txt")
    with pytest.raises(OperatorError, match=r"(dangling|loop)\.txt: cannot be read"):
        load_corpus(corpus_dir)


def test_too_little_text_is_named(corpus_dir, config):
    stream = load_corpus(corpus_dir).train[:64]
    with pytest.raises(OperatorError, match="64 training tokens are too few for seq_len 32"):
        Batches(stream, config.recipe, 0)


@given(seed=st.integers(0, 5), length=st.sampled_from([4, 8, 16]))
def test_an_epoch_visits_every_window_once(seed, length):
    """T4: rows are a function of (seed, step); within an epoch none repeats."""
    stream = np.arange(1000, dtype=np.uint16)
    recipe = Recipe(steps=9, batch_tokens=2 * length, seq_len=length, short_len=length)
    batches, again = Batches(stream, recipe, seed), Batches(stream, recipe, seed)
    windows = (len(stream) - 1 - length) // length
    rows = np.concatenate([batches.at(step) for step in range(windows // 2)])
    assert rows.shape[1] == length + 1
    assert (np.diff(rows, axis=1) == 1).all()
    assert len(np.unique(rows[:, 0])) == len(rows)
    assert np.array_equal(again.at(windows // 2 - 1), batches.at(windows // 2 - 1))
    assert not np.array_equal(batches.at(0), batches.at(windows))


def test_short_sequences_come_first(config):
    batches = Batches(np.arange(2000, dtype=np.uint16), config.recipe, 0)
    assert [batches.at(s).shape for s in (0, 5, 6, 11)] == [(16, 17), (16, 17), (8, 33), (8, 33)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedules_rise_to_the_peak_and_fall_to_zero(schedule):
    recipe = Recipe(steps=1000, warmup=0.1, schedule=schedule)
    rates = [rate(recipe, s) for s in range(1000)]
    assert rates[0] < 0.1
    assert max(rates) == pytest.approx(1.0, rel=0.02)
    assert rates[:100] == sorted(rates[:100])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] < 0.01
    middle = {"cosine": 0.5, "linear": 0.5, "wsd": 1.0}[schedule]
    assert rate(recipe, 550) == pytest.approx(middle)


def test_held_out_bits_of_an_indifferent_model_are_those_of_the_vocabulary(config):
    model = Decoder(config.model, torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(model.lm_head.weight)
    tokens = np.array([*b"some text, " * 20, EOS], dtype=np.uint16)
    done = []
    bits, counts_LE = held_out_bits(model, tokens, 32, lambda n, total: done.append((n, total)))
    assert bits == pytest.approx(math.log2(VOCAB) * 221 / 220)
    assert [int(c.sum()) for c in counts_LE] == [221 * 2] * 2
    assert done[-1] == (221, 221)


def test_held_out_bits_do_not_depend_on_how_windows_are_batched(config):
    model = Decoder(config.model, torch.Generator().manual_seed(0))
    tokens = np.random.default_rng(0).integers(0, 256, 150).astype(np.uint16)
    stream = torch.from_numpy(np.concatenate([[EOS], tokens]).astype(np.int64))
    nats = 0.0
    for start in range(0, 150, 16):
        row = stream[start : start + 17]
        nats += torch.nn.functional.cross_entropy(model(row[None, :-1]).logits_TV, row[1:], reduction="sum").item()
    assert held_out_bits(model, tokens, 16)[0] == pytest.approx(nats / math.log(2) / 150, rel=1e-6)


def test_compressors_see_the_whole_text():
    text = bytes(range(256)) * 40
    assert gzip_bits(text) == 8 * len(gzip.compress(text, 9)) / len(text)
    assert 0 < xz_bits(text) < gzip_bits(text)


def test_router_losses_follow_their_formulas():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(-1)
    ids = probabilities.topk(2).indices
    stats = router_stats(logits, probabilities, ids)
    fractions = [(ids == e).sum().item() / 100 for e in range(4)]
    expected = 4 * sum(f * probabilities[:, e].mean().item() for e, f in enumerate(fractions))
    assert stats.balance_loss.item() == pytest.approx(expected)
    assert stats.z_loss.item() == pytest.approx((logits.exp().sum(-1).log() ** 2).mean().item(), rel=1e-5)
    even = torch.full((8, 4), 0.25)
    spread = torch.tensor([[0, 1], [2, 3]] * 4)
    assert router_stats(even.log(), even, spread).balance_loss.item() == pytest.approx(1)
    assert max_over_mean([torch.tensor([1, 1]), torch.tensor([3, 1])]) == [1, 1.5]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ModelShape, {"layers": 0}, "layers: 0"),
        (ModelShape, {"hidden": 100, "heads": 3}, "hidden: 100 must be a multiple"),
        (ModelShape, {"heads": 4, "kv_heads": 3}, "kv_heads: 3 must divide"),
        (ModelShape, {"experts": 2, "top_k": 3}, "top_k: 3 must be at most"),
        (Recipe, {"lr": 0.0}, "lr: 0.0"),
        (Recipe, {"lr": float("nan")}, "lr: nan"),
        (Recipe, {"warmup": 1.5}, r"warmup: 1.5 must be in \[0, 1\]"),
        (Recipe, {"schedule": "step"}, "schedule: 'step'"),
        (Recipe, {"batch_tokens": 1000, "seq_len": 512}, r"batch_tokens: 1000 must be a multiple of seq_len \(512\)"),
        (Recipe, {"short_len": 96}, r"seq_len: 1024 must be short_len \(96\) times a power of 2"),
    ],
)
def test_bad_settings_are_named(kind, change, message):
    with pytest.raises(OperatorError, match=message):
        dataclasses.replace(kind(), **change)


def test_context_longer_than_declared_is_refused():
    with pytest.raises(OperatorError, match="seq_len: 1024 must be at most max_positions"):
        TrainConfig(ModelShape(max_positions=512))


def test_config_survives_its_dictionary_and_refuses_others(config):
    assert TrainConfig.from_dict(config.to_dict(), "here") == config
    data = config.to_dict()
    data["model"] = {**data["model"], "colour": 1}
    with pytest.raises(OperatorError, match="here: expected the fields"):
        TrainConfig.from_dict(data, "here")
