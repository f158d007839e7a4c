"""The command line's door: sub-commands by name, one-line errors, exit statuses; and what the demo is made of."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from concertina.errors import OperatorError
from concertina.orchestrator import demo
from concertina.orchestrator.cli import main as entry
from concertina.orchestrator.cli import serve


def test_help_names_every_command() -> None:
    for flag in ("--help", "-h"):
        done = CliRunner().invoke(entry.cli, [flag])
        assert done.exit_code == 0
        for name, says in entry.COMMANDS.items():
            assert name in done.output
            assert says in " ".join(done.output.split())


@pytest.mark.parametrize("name", sorted(entry.COMMANDS))
def test_every_command_has_help(name: str) -> None:
    done = CliRunner().invoke(entry.cli, [name, "--help"])
    assert done.exit_code == 0
    assert done.output.startswith("Usage:")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sing"], "No such command 'sing'"),
        (["serve"], "Missing argument 'CHECKPOINT'"),
        (["serve", "x", "--workers", "0"], "--workers"),
        (["serve", "x", "--port", "70000"], "--port"),
        (["serve", "x", "--dtype", "int3"], "--dtype"),
        (["serve", "x", "--device-memory", "lots"], "'lots' is not a size"),
        (["serve", "x", "--volume", "11"], "--volume"),
        (["serve", "x", "--emulated-step-ms", "slow"], "'slow' is not a valid float"),
    ],
)
def test_wrong_usage_ends_with_status_2(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(entry.cli, arguments)
    assert done.exit_code == 2
    assert says in done.output


def test_an_expected_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["concertina", "serve", "/nowhere/at-all", "--address", "local"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "concertina: error: /nowhere/at-all: expected a checkpoint directory, found none\n"


def test_options_become_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "concertina.orchestrator.serving.serve_until_stopped",
        lambda *args, **more: seen.append((*args, *more.values())),
    )
    options = "--workers 3 --device-memory 1GiB --exchange gloo --max-model-len 99 --no-prefix-caching --port 81"
    keys = "--api-key a --api-key b --served-model-name m --threads 2 --address local --ingress-replicas 3"
    elastic = f"--memory separate --reserve-memory --standbys 2 --hang-timeout 5 --start-timeout 9 --token {'t' * 16}"
    given = [*options.split(), *keys.split(), *elastic.split(), "--emulated-step-ms", "12.5"]
    done = CliRunner().invoke(serve.command, ["here", *given])
    assert done.exit_code == 0, done.output
    ((config, address, verbose, token_given),) = seen
    assert (address, verbose, token_given) == ("local", False, True)
    assert (config.checkpoint, config.workers, config.exchange) == ("here", 3, "gloo")
    assert config.device_memory_bytes == 1 << 30
    assert (config.engine.max_model_len, config.engine.threads, config.engine.prefix_caching) == (99, 2, False)
    assert config.engine.chunked_prefill
    assert config.engine.emulated_step_ms == 12.5
    assert config.reserve_memory
    assert (config.memory_mode, config.standbys, config.hang_timeout_s) == ("separate", 2, 5.0)
    assert config.start_timeout_s == 9.0
    assert config.token == "t" * 16
    assert (config.endpoint.port, config.endpoint.api_keys, config.endpoint.model_name) == (81, ("a", "b"), "m")
    assert config.endpoint.replicas == 3


@pytest.mark.parametrize(("options", "said"), [([], False), (["--emulated-step-ms", "15"], True)])
def test_serve_says_that_step_times_are_emulated(
    options: list[str], said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("concertina.orchestrator.serving.serve_until_stopped", lambda *args, **_: None)
    assert CliRunner().invoke(serve.command, ["here", *options]).exit_code == 0
    assert ("--emulated-step-ms 15: step times and throughput are emulated" in caplog.text) == said


def test_serve_refuses_emulated_steps_of_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "concertina.orchestrator.serving.serve_until_stopped", lambda *args, **_: pytest.fail("it serves")
    )
    done = CliRunner().invoke(serve.command, ["here", "--emulated-step-ms=-3"])
    assert isinstance(done.exception, OperatorError)
    assert "emulated-step-ms: -3.0; expected a finite number of milliseconds, 0 or more" in str(done.exception)


def test_without_a_token_it_makes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("concertina.orchestrator.serving.serve_until_stopped", lambda *args, **_: seen.append(args[0]))
    monkeypatch.delenv("CONCERTINA_TOKEN", raising=False)
    assert CliRunner().invoke(serve.command, ["here"]).exit_code == 0
    monkeypatch.setenv("CONCERTINA_TOKEN", "e" * 20)
    assert CliRunner().invoke(serve.command, ["here"]).exit_code == 0
    assert len(seen[0].token) == 32
    assert seen[1].token == "e" * 20


def test_help_imports_neither_torch_nor_ray() -> None:
    code = "import sys; import concertina.orchestrator.cli.main; print({'torch', 'ray', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_the_demo_finds_a_port_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", demo.free_port())) as taken:
        port = taken.getsockname()[1]
        assert 20_000 <= port < 32_000, "others are given to Ray's processes"
        monkeypatch.setattr(demo, "_PORTS", range(port, port + 1))
        with pytest.raises(OperatorError, match=f"port: all from {port} to {port} are in use"):
            demo.free_port()


def test_the_demo_ends_with_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OperatorError, match="concertina train x ended with status 1"):
        demo.run("train", "x")


def test_the_demo_tells_when_serve_ends_early(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OperatorError, match="serve ended with status 1"), demo.serving(tmp_path, demo.free_port()):
        pytest.fail("nothing serves")


def test_the_demo_reads_what_training_recorded(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(
        '{"summary": {"held_out_bits": 1.5, "gzip_bits": 2.25, "xz_bits": 2.0, "steps": 3}}'
    )
    assert [value for _, value in demo.training_rows(tmp_path)] == ["1.500", "2.250 / 2.000"]
