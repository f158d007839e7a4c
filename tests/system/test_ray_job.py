"""``ray job submit --working-dir . -- concertina serve …`` against a real local head, as the documentation has it."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from concertina.orchestrator.demo import free_port
from concertina.orchestrator.tokens import token_file

from ..checkpoints import make_checkpoint
from .command import GONE_S, START_S, concertina, descendants, healthy, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MOST_UPLOADED_BYTES = 20 << 20
# Ends with exit status 0; prints what is alive in the cluster.
ALIVE = """
import ray
from ray.util.state import list_actors
ray.init("auto", log_to_driver=False, logging_level="ERROR")
print(*(a.class_name for a in list_actors(filters=[("state", "=", "ALIVE")])), sep="\\n")
"""


@dataclass(frozen=True)
class Head:
    """A Ray cluster of one node, with everything of its own: ports, files."""

    process: subprocess.Popen[bytes]
    directory: Path
    env: dict[str, str]

    def ray(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(BIN / "ray"), *arguments],
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def alive_actors(self) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", ALIVE], env=self.env, capture_output=True, text=True, timeout=START_S, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    directory = Path(tempfile.mkdtemp(prefix="ct-", dir="/tmp"))
    port, dashboard = free_port(), free_port()
    env = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(directory),
        "RAY_AUTH_MODE": "token",  # ray start takes a token that it finds, but ray job shows it only when told to
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": f"127.0.0.1:{port}",
    }
    options = {
        "port": port,
        "dashboard-port": dashboard,
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": free_port(),
        "node-ip-address": "127.0.0.1",
        "num-cpus": 2,
        "object-store-memory": 100 << 20,
        "temp-dir": directory,
        "include-dashboard": "true",
    }
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    starting_env = {name: value for name, value in env.items() if name != "RAY_ADDRESS"}
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, env=starting_env, stdout=log, stderr=log)
    jobs_env = {**env, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    try:
        wait_for(
            lambda: process.poll() is not None or healthy_dashboard(dashboard),
            lambda: (directory / "log").read_text(),
            START_S,
        )
        assert process.poll() is None, (directory / "log").read_text()
        yield Head(process, directory, jobs_env)
    finally:
        end(process)
        shutil.rmtree(directory, ignore_errors=True)


def healthy_dashboard(port: int) -> bool:
    """Whether it answers at all, with whatever status: it may ask for a token."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=5)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a head by its processes, never those of another one."""
    below = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(GONE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in below:
        if child.pid != process.pid and child.runs:
            os.kill(child.pid, signal.SIGKILL)


def ask(url: str, model: str) -> int:
    """Tokens of a completion."""
    asked = {"model": model, "prompt": "def f(", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    body = json.dumps(asked).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        tokens: int = json.load(answer)["usage"]["completion_tokens"]
        return tokens


@pytest.mark.timeout(600)
@pytest.mark.parametrize("form", [["concertina"], ["python", "-m", "concertina"]], ids=["script", "module"])
def test_a_job_serves_until_it_is_stopped(head: Head, tmp_path: Path, form: list[str]) -> None:
    checkpoint = make_checkpoint("qwen3_moe", tmp_path / "tiny")
    port = free_port()
    job, url = f"serve-{form[0]}", f"http://127.0.0.1:{port}"
    serve = [*form, "serve", str(checkpoint), "--workers", "2", "--port", str(port)]
    head.ray("job", "submit", "--no-wait", "--submission-id", job, "--working-dir", ".", "--", *serve)
    wait_for(lambda: healthy(url) or "RUNNING" not in state(head, job), lambda: head.ray("job", "logs", job), START_S)
    assert healthy(url), head.ray("job", "logs", job)
    assert ask(url, "tiny") == 12
    found = workers(head)
    assert [w["state"] for w in found] == ["serving", "serving"]
    # The controller asks its workers every second.
    wait_for(lambda: sum(w["generated_tokens"] for w in workers(head)) == 12, lambda: f"{workers(head)}")
    assert {"ControllerService", "WorkerActor", "OwnerActor"} <= set(head.alive_actors())
    wait_for(lambda: head.alive_actors().count("ProxyActor") == 2, lambda: f"alive: {head.alive_actors()}")
    pids = [w["pid"] for w in found]
    if form == ["concertina"]:
        check_a_second_one_is_refused(head, checkpoint, port)
    assert token_file("concertina").exists()
    head.ray("job", "stop", job)
    wait_for(lambda: head.alive_actors() == [], lambda: f"alive: {head.alive_actors()}")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not healthy(url)
    assert not token_file("concertina").exists()
    assert head.process.poll() is None


def check_a_second_one_is_refused(head: Head, checkpoint: Path, port: int) -> None:
    """Before anything is loaded for it; each message leads on."""
    for name, other, says in (
        ("concertina", port, "name: a deployment called 'concertina' already runs"),
        ("second", free_port(), f"Ray Serve runs in this cluster already; expected its port, {port}"),
        ("second", port, "endpoint: application 'concertina' answers in this cluster"),
    ):
        done = concertina("serve", str(checkpoint), "--name", name, "--port", str(other), env=head.env)
        assert done.returncode == 1
        assert says in done.stderr.splitlines()[-1]
        assert "--address local" in done.stderr or name == "concertina"


def workers(head: Head) -> list[dict[str, Any]]:
    """As the status tells them."""
    shown = concertina("status", "--json", env=head.env)
    assert shown.returncode == 0, shown.stderr
    told: list[dict[str, Any]] = json.loads(shown.stdout)["workers"]
    return told


def state(head: Head, job: str) -> str:
    return head.ray("job", "status", job).upper().replace("PENDING", "RUNNING")


def test_the_upload_is_small(head: Head) -> None:
    """Ray leaves out what ``.gitignore`` names, ``.git`` and virtual environments."""
    done = subprocess.run(
        [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", "sh", "-c", "du -sb . && ls -A"],
        cwd=ROOT,
        env=head.env,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    size = re.search(r"^(\d+)\s+\.$", done.stdout, re.MULTILINE)
    assert size is not None, done.stdout
    assert int(size[1]) < MOST_UPLOADED_BYTES
    assert "pyproject.toml" in done.stdout.split()
    assert not {".venv", ".git", ".demo"} & set(done.stdout.split())
