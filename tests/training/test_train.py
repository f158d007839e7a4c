"""Whole runs: they learn, they can be interrupted anywhere, and what they write is a checkpoint."""

import dataclasses
import json

import pytest
import torch
from concertina.errors import OperatorError
from concertina.workers.training.config import ModelShape, TrainConfig
from concertina.workers.training.data import load_corpus
from concertina.workers.training.loop import RunOptions, train
from concertina.workers.training.model import Decoder
from concertina.workers.training.report import Silent, TrainingStopped
from concertina.workers.training.state import STATE, TrainState
from safetensors.torch import load_file


class Losses(Silent):
    def __init__(self) -> None:
        self.bits, self.first_step = [], None

    def start(self, run) -> None:
        self.first_step = run.first_step

    def step(self, number, result) -> None:
        self.bits.append(result.bits_per_byte)


def stop_after(steps: int):
    """A stop condition that becomes true after so many steps of this session."""
    asked = iter([False] * (steps - 1) + [True])
    return lambda: next(asked)


def options(out, data, **changes) -> RunOptions:
    return RunOptions(out, data, threads=1, **changes)


def test_a_run_learns_and_counts_what_it_did(tmp_path, corpus_dir, config):
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, steps=60))
    losses = Losses()
    summary = train(config, options(tmp_path / "out", corpus_dir), losses)
    assert losses.bits[0] == pytest.approx(8, abs=0.2)
    assert summary.train_bits < losses.bits[0] - 1
    assert summary.held_out_bits < 6
    assert (summary.steps, summary.tokens, summary.session_steps) == (60, 60 * 256, 60)
    corpus = load_corpus(corpus_dir)
    assert summary.held_out_bytes == sum((corpus_dir / n).stat().st_size for n in corpus.held_out_files)
    assert all(1 <= b <= config.model.experts for b in summary.balance)
    assert not (tmp_path / "out" / STATE).exists()


@pytest.mark.parametrize("first", [1, 5, 6, 11])
def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path, corpus_dir, config, first):
    """T1: a resumed run has the losses and the weights of one that was never stopped."""
    whole, head, tail = Losses(), Losses(), Losses()
    train(config, options(tmp_path / "whole", corpus_dir), whole)
    with pytest.raises(TrainingStopped, match=f"after step {first} of 12.*same command"):
        train(config, options(tmp_path / "cut", corpus_dir, stop=stop_after(first)), head)
    assert not (tmp_path / "cut" / "config.json").exists()
    summary = train(config, options(tmp_path / "cut", corpus_dir), tail)
    assert tail.first_step == first
    assert head.bits + tail.bits == whole.bits
    assert summary.session_steps == 12 - first
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_killed_between_saves_resumes_from_the_last_one(tmp_path, corpus_dir, config):
    class Killed(Exception):
        pass

    class Kill(Losses):
        def step(self, number, result):
            super().step(number, result)
            if number == 9:
                raise Killed

    whole, killed, tail = Losses(), Kill(), Losses()
    train(config, options(tmp_path / "whole", corpus_dir), whole)
    with pytest.raises(Killed):
        train(config, options(tmp_path / "cut", corpus_dir, save_every=4), killed)
    train(config, options(tmp_path / "cut", corpus_dir), tail)
    assert tail.first_step == 8
    assert killed.bits[:8] + tail.bits == whole.bits


def test_seeds_decide_the_numbers(tmp_path, corpus_dir, config):
    runs = []
    for i, seed in enumerate((3, 3, 4)):
        losses = Losses()
        train(dataclasses.replace(config, seed=seed), options(tmp_path / str(i), corpus_dir), losses)
        runs.append(losses.bits)
    assert runs[0] == runs[1] != runs[2]


def test_a_finished_run_returns_its_summary_without_training(tmp_path, corpus_dir, config):
    first = train(config, options(tmp_path / "out", corpus_dir))
    losses = Losses()
    again = train(config, options(tmp_path / "out", corpus_dir), losses)
    assert again == first
    assert losses.bits == []


def test_no_resume_discards_only_what_a_run_wrote(tmp_path, corpus_dir, config):
    out = tmp_path / "out"
    train(config, options(out, corpus_dir))
    (out / "notes.txt").write_text("mine")
    other = dataclasses.replace(config, seed=9)
    with pytest.raises(OperatorError, match=r"seed: 3 -> 9.*--no-resume"):
        train(other, options(out, corpus_dir))
    train(other, options(out, corpus_dir, resume=False))
    assert json.loads((out / "training.json").read_text())["config"]["seed"] == 9
    assert (out / "notes.txt").read_text() == "mine"


def test_other_data_is_not_resumed(tmp_path, corpus_dir, config):
    with pytest.raises(TrainingStopped):
        train(config, options(tmp_path / "out", corpus_dir, stop=stop_after(2)))
    (corpus_dir / "more.txt").write_text("new text")
    with pytest.raises(OperatorError, match=r"other settings.*data: the contents"):
        train(config, options(tmp_path / "out", corpus_dir))


def test_a_foreign_folder_is_left_alone(tmp_path, corpus_dir, config):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    for resume in (True, False):
        with pytest.raises(OperatorError, match="did not write"):
            train(config, options(out, corpus_dir, resume=resume))
    assert [p.name for p in out.iterdir()] == ["config.json"]


def test_a_damaged_record_or_state_is_named(tmp_path, corpus_dir, config):
    out = tmp_path / "out"
    with pytest.raises(TrainingStopped):
        train(config, options(out, corpus_dir, stop=stop_after(2)))
    state = (out / STATE).read_bytes()
    (out / STATE).write_bytes(state[: len(state) // 2])
    with pytest.raises(OperatorError, match=f"{STATE}: cannot be resumed from"):
        train(config, options(out, corpus_dir))
    (out / "training.json").write_text('{"format": "other"}')
    with pytest.raises(OperatorError, match=r"training\.json: expected a record"):
        train(config, options(out, corpus_dir))
    (out / "training.json").write_text("{")
    with pytest.raises(OperatorError, match=r"training\.json: expected a readable JSON"):
        train(config, options(out, corpus_dir))


def test_a_state_of_another_shape_is_refused(tmp_path, config):
    TrainState.initial(config).save(tmp_path)
    other = TrainConfig(dataclasses.replace(config.model, expert_hidden=8), config.recipe, config.seed)
    with pytest.raises(OperatorError, match=r"moe\.gate_up.*expected torch\.float32 \[5, 16, 16\]"):
        TrainState.initial(other).load(tmp_path)


def test_an_exploding_run_says_so(tmp_path, corpus_dir, config):
    class Poison(Losses):
        def start(self, run):
            super().start(run)
            torch.nn.init.constant_(models[0].lm_head.weight, float("nan"))

    models = []
    original = Decoder.__init__

    def remember(self, *args):
        original(self, *args)
        models.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "__init__", remember)
        with pytest.raises(OperatorError, match="not finite; try a smaller --lr"):
            train(config, options(tmp_path / "out", corpus_dir), Poison())


def test_parameter_count_of_one_token():
    shape = ModelShape(layers=1, hidden=8, heads=1, kv_heads=1, experts=4, top_k=1, expert_hidden=2)
    total, active = Decoder(shape, torch.Generator()).parameter_count()
    assert total - active == 3 * (3 * 8 * 2)
