"""The command a user types, as a process: requests through the real client, what it shows, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import load_file, save_file

from ..checkpoints import make_checkpoint
from .command import GONE_S, Server, concertina, descendants, wait_for

pytestmark = pytest.mark.ray

KEY = "sesame"
MODEL = "tiny"
_SLOW_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe") / MODEL)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with Server.start(checkpoint, "--workers", "2", "--api-key", KEY, "--max-model-len", "200") as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def status(server: Server) -> dict[str, Any]:
    done = concertina("status", "--json", "--name", server.name, env=server.env)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == MODEL


def test_completions_stream_what_they_return_at_once(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "def f(x):", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (9, 20, 29)
    assert whole.choices[0].finish_reason == "length"
    events = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.text for e in events for c in e.choices) == whole.choices[0].text
    assert sum(bool(e.choices) for e in events) > 1
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 20


def test_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len("user: hello\nassistant:")
    assert whole.choices[0].message.role == "assistant"
    events = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0, stream=True)
    text = "".join(c.delta.content or "" for e in events for c in e.choices)
    assert text == whole.choices[0].message.content


def test_many_requests_at_once_use_both_workers(client: openai.OpenAI, server: Server) -> None:
    before = status(server)
    answer = client.completions.create(model=MODEL, prompt=[f"{i}" * 20 for i in range(12)], max_tokens=8)
    assert len(answer.choices) == 12
    after = status(server)
    for old, new in zip(before["workers"], after["workers"], strict=True):
        assert new["prompt_tokens"] > old["prompt_tokens"]
        assert new["routed_tokens"] > old["routed_tokens"]


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "gpt-9"),
        ({"prompt": "x" * 300}, openai.BadRequestError, "200"),
        ({"max_tokens": 500}, openai.BadRequestError, "200"),
        ({"prompt": ""}, openai.BadRequestError, "prompt"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ],
)
def test_what_cannot_be_served_is_refused(
    client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], says: str
) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 4, **fields}
    with pytest.raises(error) as raised:
        client.completions.create(**asked)
    assert says in raised.value.message


def test_a_wrong_key_is_refused(server: Server) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_status_tells_devices_pages_and_experts(server: Server) -> None:
    found = status(server)
    assert (found["model"], found["phase"], found["exchange"], found["generation"]) == (MODEL, "serving", "shared", 1)
    assert [w["state"] for w in found["workers"]] == ["serving", "serving"]
    assert len({w["pid"] for w in found["workers"]}) == 2
    assert found["layers"] == 3
    for layer in range(found["layers"]):
        assert sum(w["experts_per_layer"][layer] for w in found["workers"]) >= found["experts"] == 7
    for pool in found["pools"]:
        assert sum(pool["by_purpose"].values()) == pool["pages"]
    assert sum(pool["by_purpose"]["experts"] for pool in found["pools"]) > 0


def test_status_as_a_table(server: Server) -> None:
    done = concertina("status", "--once", "--name", server.name, env={**server.env, "COLUMNS": "80"})
    assert done.returncode == 0
    assert "cpu-0" in done.stdout
    assert "cpu-1" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_status_of_nobody(server: Server) -> None:
    done = concertina("status", "--json", "--name", "nobody", env=server.env)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("concertina: error: name: no deployment called 'nobody'")
    assert server.name in done.stderr


def test_metrics(client: openai.OpenAI, server: Server) -> None:
    client.completions.create(model=MODEL, prompt="abc", max_tokens=4)
    values = dict(
        line.rsplit(" ", 1) for line in fetch(f"{server.url}/metrics").splitlines() if not line.startswith("#")
    )
    assert float(values["concertina_generated_tokens_total"]) >= 4
    assert sum(name.startswith("concertina_worker_connected") for name in values) == 2


def test_ctrl_c_ends_everything(server: Server) -> None:
    """Runs last: it ends the server that the tests above share."""
    traces = server.traces()
    assert len(traces.processes) > 5
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(GONE_S) == 0
    assert "Traceback" not in server.stderr
    wait_for(lambda: not traces.left(), lambda: f"left behind: {traces.left()}")


def test_what_cannot_be_recovered_ends_it_with_the_reason(checkpoint: Path, tmp_path: Path) -> None:
    """Nobody has the weights any more: those who held them are killed, and the checkpoint is gone."""
    path = shutil.copytree(checkpoint, tmp_path / "lost")
    with Server.start(path, "--standbys", "0") as server:
        server.wait_until_healthy()
        traces = server.traces()
        (path / "model.safetensors").unlink()
        for process in traces.processes:
            if process.name.startswith(("ray::WorkerActor", "ray::OwnerActor")):
                os.kill(process.pid, signal.SIGKILL)
        assert server.process.wait(GONE_S) == 1
        last = server.stderr.splitlines()[-1]
        assert last.startswith("concertina: error: ")
        assert "model.safetensors" in last
        assert "Traceback" not in server.stderr
        wait_for(lambda: not traces.left(), lambda: f"left behind: {traces.left()}")


def twice(server: Server) -> bool:
    """Whether the second of everything that holds clients' connections is there, or starts."""
    names = [process.name for process in descendants(server.process.pid)]
    return all(sum(kind in name for name in names) == 2 for kind in ("ProxyActor", "ServeReplica"))


def test_a_killed_driver_leaves_nothing(checkpoint: Path) -> None:
    with Server.start(checkpoint, "--workers", "2") as server:
        server.wait_until_healthy()
        wait_for(lambda: twice(server), lambda: "the endpoint is not doubled")
        traces = server.traces()
        server.process.kill()
        server.process.wait()
        # Ray's own agents, which hold nothing of ours, look for their head for another minute.
        ours = replace(traces, processes=[p for p in traces.processes if p.name.split(" ")[0] not in _SLOW_AGENTS])
        wait_for(lambda: not ours.left(), lambda: f"left behind: {ours.left()}", 30)


def _edit_config(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def _edit_tensors(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


_GATE = "model.layers.1.mlp.gate.weight"
_BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing": (shutil.rmtree, ["checkpoint directory"]),
    "unsupported": (lambda p: _edit_config(p, architectures=["LlamaForCausalLM"]), ["architectures", "LlamaFor"]),
    "truncated": (lambda p: os.truncate(p / "model.safetensors", 50_000), ["model.safetensors", "truncated"]),
    "no-config": (lambda p: (p / "config.json").unlink(), ["config.json"]),
    "no-tensor": (lambda p: _edit_tensors(p, lambda t: t.pop(_GATE)), [_GATE]),
    "shape": (lambda p: _edit_tensors(p, lambda t: t.update({_GATE: t[_GATE][:, 1:].contiguous()})), [_GATE, "48"]),
}


def assert_refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("concertina: error: ")
    for word in says:
        assert word in last


@pytest.mark.parametrize("broken", _BROKEN)
def test_a_broken_checkpoint_is_named(checkpoint: Path, tmp_path: Path, broken: str) -> None:
    path = shutil.copytree(checkpoint, tmp_path / "broken")
    spoil, says = _BROKEN[broken]
    spoil(path)
    done = concertina("serve", str(path), "--address", "local")
    assert_refused(done, "broken", *says)
    assert len(done.stderr.splitlines()) == 1


def test_options_that_cannot_be_are_named(checkpoint: Path, tmp_path: Path) -> None:
    """All of these are found before Ray is started, hence only one line."""
    broken, small = tmp_path / "broken.json", tmp_path / "small.json"
    broken.write_text('{"devices": [')
    replica = {"device": 0, "slot": 0}
    small.write_text(json.dumps({"devices": ["a"], "layers": [[[replica]]]}))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            ("--max-model-len", "5000"): ["max-model-len", "5000", "1024"],
            ("--port", port): ["port", port],
            ("--placement", str(broken)): ["broken.json"],
            ("--placement", str(small)): ["small.json", "1 devices, 1 MoE layers and 1 experts", "1, 3 and 7"],
            ("--placement", str(tmp_path / "none.json")): ["none.json"],
            ("--name", "a b"): ["name", "'a b'"],
        }
        for options, says in cases.items():
            done = concertina("serve", str(checkpoint), "--address", "local", *options)
            assert_refused(done, *says)
            assert len(done.stderr.splitlines()) == 1


def test_too_little_memory_is_told_with_the_numbers(checkpoint: Path) -> None:
    with Server.start(checkpoint, "--device-memory", "2MiB") as server:
        traces = server.traces()
        assert server.process.wait(120) == 1
        done = subprocess.CompletedProcess((), 1, "", server.stderr)
        assert_refused(done, "device-memory: 2.0 MiB", "21 experts")
        wait_for(lambda: not traces.left(), lambda: f"left behind: {traces.left()}")


def test_no_cluster_at_the_address(checkpoint: Path) -> None:
    done = concertina("serve", str(checkpoint), "--address", "127.0.0.1:9")
    assert_refused(done, "address", "127.0.0.1:9")
