"""The command: options to a configuration, signals to a saved state, a run to a table or JSON."""

import dataclasses
import json
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner
from concertina.errors import OperatorError
from concertina.orchestrator.cli.train import command
from concertina.orchestrator.cli.train_view import Bar
from concertina.workers.training.config import Recipe, TrainConfig
from concertina.workers.training.loop import RunOptions
from concertina.workers.training.pace import steps_for

SMALL = [
    *("--layers", "1", "--hidden", "8", "--heads", "1", "--kv-heads", "1", "--experts", "3", "--expert-hidden", "4"),
    *("--batch-tokens", "64", "--seq-len", "16", "--short-len", "16", "--threads", "1"),
]


def invoke(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)


def test_json_summary_and_recorded_configuration(tmp_path, corpus_dir):
    out = tmp_path / "out"
    result = invoke(
        out, "--data", corpus_dir, "--steps", 20, "--seed", 5, "--lr", 0.02, "--norm-topk", "--json", *SMALL
    )
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert (summary["steps"], summary["tokens"], summary["path"]) == (20, 20 * 64, str(out))
    config = json.loads((out / "training.json").read_text())["config"]
    assert (config["seed"], config["recipe"]["lr"], config["model"]["norm_topk"]) == (5, 0.02, True)
    assert "step 20/20" in result.stderr


def test_table_names_every_figure(tmp_path, corpus_dir):
    result = invoke(tmp_path / "out", "--data", corpus_dir, "--steps", 2, *SMALL)
    for name in (
        "steps",
        "tokens/s",
        "training loss",
        "held-out loss",
        "gzip -9",
        "xz -9e",
        "busiest expert",
        "checkpoint",
    ):
        assert name in result.stdout


def test_interrupt_saves_and_the_same_command_goes_on(tmp_path, corpus_dir, monkeypatch):
    out = tmp_path / "out"
    arguments = (out, "--data", corpus_dir, "--steps", 9, *SMALL)
    step = Bar.step

    def interrupt(self, number, result):
        step(self, number, result)
        if number == 4:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Bar, "step", interrupt)
    stopped = invoke(*arguments)
    assert stopped.exit_code == 130
    assert "stopped after step 4 of 9" in stopped.stderr
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(Bar, "step", step)
    resumed = invoke(*arguments)
    assert resumed.exit_code == 0
    assert "resuming after step 4 of 9" in resumed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "3", "--minutes", "1"], "exclude each other"),
        (["--minutes", "0"], "--minutes"),
        (["--schedule", "stairs"], "--schedule"),
        (["--lr", "fast"], "--lr"),
    ],
)
def test_bad_options_are_usage_errors(tmp_path, arguments, message):
    result = invoke(tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_bad_values_leave_no_folder(tmp_path, corpus_dir):
    with pytest.raises(OperatorError, match="top_k: 99"):
        invoke(tmp_path / "out", "--data", corpus_dir, "--top-k", 99)
    with pytest.raises(OperatorError, match="is not a directory"):
        invoke(tmp_path / "out", "--data", tmp_path / "missing", *SMALL)
    assert not (tmp_path / "out").exists()


def test_minutes_choose_steps_once(tmp_path, corpus_dir, config):
    """A measured number of steps grows with the time; a run that exists keeps its own."""
    options = RunOptions(tmp_path / "out", corpus_dir, threads=1)
    assert steps_for(10, config, options) > steps_for(0.0001, config, options) >= 1
    invoke(tmp_path / "out", "--data", corpus_dir, "--steps", 3, *SMALL)
    assert steps_for(10, config, options) == 3


def test_every_setting_has_an_option():
    names = {p.name for p in command.params}
    fields = {f.name for kind in (type(TrainConfig().model), Recipe) for f in dataclasses.fields(kind)}
    assert fields - names == {"rope_theta", "rms_eps"}


def test_a_second_run_of_a_finished_one_says_so(tmp_path, corpus_dir):
    arguments = (tmp_path / "out", "--data", corpus_dir, "--steps", 2, "--json", *SMALL)
    first, second = invoke(*arguments), invoke(*arguments)
    assert "trained before" in second.stderr
    assert json.loads(first.stdout) == json.loads(second.stdout)


def test_help_does_not_import_torch():
    code = "import sys; from concertina.orchestrator.cli import train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
