"""``concertina serve`` as it is changed, and as its processes are killed, while the real client streams."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import ray
from concertina.errors import OperatorError
from concertina.orchestrator.api import Deployment
from concertina.orchestrator.status import DeploymentStatus
from ray import serve
from ray._private.authentication_test_utils import reset_auth_token_state

from ..checkpoints import make_checkpoint
from .client_load import ClientLoad
from .command import GONE_S, Process, Server, concertina, descendants, wait_for
from .freeze import frozen_engine

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MODEL = "tiny"
WAIT_S = 60.0
OPTIONS = {
    "workers": "2",
    "dtype": "float32",
    "max-model-len": "500",
    "device-memory": "10MiB",
    "hang-timeout": "3",
    "exchange-timeout": "20",
    "rebalance-interval": "0",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    checkpoint = make_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe") / MODEL)
    with Server.start(checkpoint, *(f"--{name}={value}" for name, value in OPTIONS.items())) as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def deployment(server: Server) -> Iterator[Deployment]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        reset_auth_token_state()  # Ray reads its environment once
        yield Deployment(server.name)
        ray.shutdown()
    reset_auth_token_state()


@pytest.fixture(scope="module")
def load(client: openai.OpenAI) -> Iterator[ClientLoad]:
    """Streams that go on from test to test, and must not notice any of them."""
    load = ClientLoad(client, MODEL)
    yield load
    load.stop()


def command(server: Server, *arguments: str, env: dict[str, str] | None = None) -> Any:
    """What a command that succeeds prints as JSON."""
    done = concertina(*arguments, "--json", "--name", server.name, env={**server.env, **(env or {})})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(server: Server, *arguments: str, env: dict[str, str] | None = None) -> str:
    """What a command that fails says at last."""
    done = concertina(*arguments, "--name", server.name, env={**server.env, **(env or {})})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def settled(deployment: Deployment, workers: int, least_generation: int = 0) -> DeploymentStatus:
    def looked() -> bool:
        nonlocal status
        status = deployment.status()
        serves = status.phase == "serving" and [w.state for w in status.workers] == ["serving"] * workers
        return serves and status.generation >= least_generation and status.standbys == 1 and len(status.pools) == 1

    status = deployment.status()
    wait_for(looked, lambda: f"not settled: {status}")
    return status


def same_pages(deployment: Deployment, before: DeploymentStatus) -> None:
    """Return once pools hold as many pages for every purpose as they did; the last are given back in later turns."""

    def pages(status: DeploymentStatus) -> list[object]:
        return [(pool.name, pool.by_purpose) for pool in status.pools]

    wait_for(lambda: pages(deployment.status()) == pages(before), lambda: f"{deployment.status()}, not {before}")


def kv_blocks(status: DeploymentStatus) -> int:
    """Of the worker with fewest."""
    return min(worker.load.kv_blocks for worker in status.workers)


def running(server: Server, kind: str) -> list[Process]:
    """Processes of an actor's kind."""
    return [p for p in descendants(server.process.pid) if p.name.startswith(f"ray::{kind}") and p.runs]


def test_growing_and_shrinking(server: Server, deployment: Deployment, load: ClientLoad) -> None:
    before = settled(deployment, 2)
    preview = command(server, "scale", "--workers", "3", "--dry-run")
    assert (preview["workers_before"], preview["workers_after"]) == (2, 3)
    assert settled(deployment, 2).generation == before.generation

    done = command(server, "scale", "--workers", "3", "--wait", "--timeout", "60s")
    assert (done["state"], done["text"]) == ("done", "2 -> 3 workers")
    grown = settled(deployment, 3)
    assert kv_blocks(grown) > kv_blocks(before)
    assert grown.generation == before.generation + 1
    assert command(server, "scale", "--workers", "3", "--wait")["reason"] == "nothing to do"

    withdrawn = deployment.scale(6)  # has to start workers, which takes seconds
    assert deployment.cancel(withdrawn.id).state == "canceled"
    assert "ended already (canceled)" in refused(server, "cancel", withdrawn.id)
    assert settled(deployment, 3).generation == grown.generation

    drained = command(server, "drain", "cpu-1", "--deadline", "30s", "--wait")
    assert drained["state"] == "done"
    shrunk = settled(deployment, 2)
    assert [worker.device for worker in shrunk.workers] == ["cpu-0", "cpu-2"]
    assert kv_blocks(shrunk) == kv_blocks(before)
    same_pages(deployment, before)
    assert command(server, "rebalance", "--wait")["state"] == "done"
    load.more()
    print(f"longest silence while scaling: {load.silent_s:.2f} s")


def test_only_the_token_opens_it(server: Server, deployment: Deployment) -> None:
    before = settled(deployment, 2)
    wrong = {"CONCERTINA_TOKEN": "x" * 32}
    scale = ("scale", "--workers", "1")
    for arguments in (scale, (*scale, "--dry-run"), ("drain", "cpu-0"), ("rebalance",), ("cancel", "op-1")):
        assert refused(server, *arguments, env=wrong).endswith(
            "token: it is not this deployment's: the one in CONCERTINA_TOKEN"
        )
    with pytest.raises(OperatorError, match="expected at least 16"):
        Deployment(server.name, token="short").scale(1)
    assert settled(deployment, 2).generation == before.generation


def workers(server: Server, status: DeploymentStatus) -> list[int]:
    """One that stays, whatever is changed."""
    return [min(status.workers, key=lambda worker: worker.device).pid]


def owners(server: Server, status: DeploymentStatus) -> list[int]:
    return [p.pid for p in running(server, "OwnerActor")]


def both(server: Server, status: DeploymentStatus) -> list[int]:
    return workers(server, status) + owners(server, status)


def controllers(server: Server, status: DeploymentStatus) -> list[int]:
    return [p.pid for p in running(server, "ControllerService")]


Victims = Callable[[Server, DeploymentStatus], list[int]]
KILLS: dict[str, tuple[Victims, int, int]] = {  # whom, how, and generations that come of it
    "worker": (workers, signal.SIGKILL, 1),
    "owner": (owners, signal.SIGKILL, 0),
    "both": (both, signal.SIGKILL, 1),
    "controller": (controllers, signal.SIGKILL, 0),
    "hang": (workers, signal.SIGSTOP, 1),
    "owner hangs": (owners, signal.SIGSTOP, 0),
}


@pytest.mark.parametrize("kind", KILLS)
def test_a_process_that_dies_is_not_noticed(
    server: Server, deployment: Deployment, load: ClientLoad, kind: str
) -> None:
    victims, number, generations = KILLS[kind]
    before = settled(deployment, 2)
    load.more(1)
    load.silent_s = 0.0
    struck = [process for pid in victims(server, before) if (process := Process.of(pid)) is not None]
    assert struck
    for process in struck:
        os.kill(process.pid, number)
    wait_for(lambda: not any(p.runs for p in struck), lambda: f"still there: {struck}")
    after = settled(deployment, 2, before.generation + generations)
    assert after.generation == before.generation + generations
    assert kv_blocks(after) == kv_blocks(before)
    same_pages(deployment, before)
    load.more(3)
    print(f"longest silence, {kind}: {load.silent_s:.2f} s")


@pytest.mark.parametrize("kind", KILLS)
def test_a_process_that_dies_during_a_change_is_not_noticed(
    server: Server, deployment: Deployment, load: ClientLoad, kind: str
) -> None:
    """At any moment of growing and of shrinking; the target is reached, and nothing is left of what was tried."""
    victims, number, _ = KILLS[kind]
    moments, before, states = random.Random(kind), settled(deployment, 2), []
    for workers in (3, 2):
        status = deployment.status()
        operation = deployment.scale(workers)
        time.sleep(moments.uniform(0.0, 0.1 if workers == 3 else 0.15))  # it takes 0.1 to 0.3 s
        states.append(deployment.operation(operation.id).state)
        struck = [process for pid in victims(server, status) if (process := Process.of(pid)) is not None]
        assert struck
        for process in struck:
            os.kill(process.pid, number)
        wait_for(lambda: not any(p.runs for p in struck), lambda: f"still there: {struck}")  # noqa: B023
        ended = deployment.wait(operation.id, WAIT_S)
        assert ended.state == "done", ended
        settled(deployment, workers)
    assert "running" in states, "none was struck before its end"
    same_pages(deployment, before)
    load.more(3)


def test_an_engine_that_hangs_is_not_noticed(server: Server, deployment: Deployment, load: ClientLoad) -> None:
    """The process answers, but the thread that computes does not come back.

    Not if that thread has the interpreter at that moment: then nothing answers, which is the other case, and it is
    struck again.
    """
    for _ in range(6):
        before = settled(deployment, 2)
        load.more(1)
        struck = Process.of(before.workers[1].pid)
        assert struck is not None
        with frozen_engine(struck.pid):
            wait_for(lambda: not struck.runs, lambda: f"still there: {deployment.status()}", limit_s=90.0)  # noqa: B023
        after = settled(deployment, 2, before.generation + 1)
        assert kv_blocks(after) == kv_blocks(before)
        same_pages(deployment, before)
        load.more()
        if any("has to be ended: its engine has made no progress" in log for log in server.logs()):
            return
    pytest.fail("no engine was seen to hang beside a process that answers")


def doubled(server: Server) -> bool:
    """Whether everything that holds clients' connections is there twice; the second door opens before the replica."""
    if len(doors(server)) != 2 or len(replicas(server)) != 2:
        return False  # Serve may not know yet of one that was killed
    return serve.status().applications[server.name].deployments["ingress"].replica_states == {"RUNNING": 2}


def doors(server: Server) -> list[Process]:
    return running(server, "ProxyActor")


def running_sequences(deployment: Deployment) -> int:
    return sum(worker.load.running + worker.load.waiting for worker in deployment.status().workers)


def replicas(server: Server) -> list[Process]:
    return running(server, "ServeReplica")


def answered(server: Server) -> float:
    """Requests that the endpoint says it has answered."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("concertina_requests_total"))


def test_with_two_replicas_one_counts_and_routes(
    server: Server, client: openai.OpenAI, deployment: Deployment, load: ClientLoad
) -> None:
    load.stop()
    wait_for(lambda: doubled(server), lambda: f"not doubled: {serve.status()}")
    before = answered(server)
    for more in range(1, 9):
        client.completions.create(model=MODEL, prompt="def f(x):", max_tokens=1)
        assert answered(server) == before + more


@pytest.mark.parametrize(
    "kind",
    ["replica", "its successor while growing", "a replica while shrinking", "door", "the other door while growing"],
)
def test_when_the_ingress_is_killed_a_retry_is_served_at_once(
    server: Server, deployment: Deployment, load: ClientLoad, kind: str
) -> None:
    load.stop()
    before, changing = settled(deployment, 2), None
    if "shrinking" in kind:
        assert deployment.wait(deployment.scale(3).id, WAIT_S).state == "done"
    wait_for(lambda: doubled(server), lambda: f"not doubled: {serve.status()}")
    asked: dict[str, Any] = {"model": MODEL, "prompt": "def f(x):", "temperature": 0}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as client:  # it retries twice
        whole = client.completions.create(**asked, max_tokens=8).choices[0].text
        stream = iter(client.completions.create(**asked, max_tokens=480, stream=True))
        next(stream)
        if "while" in kind:
            changing = deployment.scale(2 if "shrinking" in kind else 3)
            time.sleep(random.Random(kind).uniform(0.0, 0.1))
        struck = min(doors(server) if "door" in kind else replicas(server), key=lambda process: process.started)
        os.kill(struck.pid, signal.SIGKILL)
        if "door" in kind:  # the stream may have come through the other one
            with contextlib.suppress(openai.APIConnectionError):
                list(stream)
        else:
            with pytest.raises(openai.APIConnectionError):
                list(stream)
        begin_s = time.monotonic()
        assert client.completions.create(**asked, max_tokens=8).choices[0].text == whole
        print(f"{kind}: retry served after {time.monotonic() - begin_s:.2f} s")
        assert "door" in kind or not doubled(server), "it was served by who takes the killed one's place"
    if changing is not None:
        assert deployment.wait(changing.id, WAIT_S).state == "done"
        assert deployment.wait(deployment.scale(2).id, WAIT_S).state == "done"
    wait_for(lambda: not running_sequences(deployment), lambda: f"left behind: {deployment.status()}")
    same_pages(deployment, before)


def test_everything_ends(server: Server, deployment: Deployment) -> None:
    """Runs last."""
    ray.shutdown()
    traces = server.traces()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(GONE_S) == 0, server.stderr
    assert "Traceback" not in server.stderr
    wait_for(lambda: not traces.left(), lambda: f"left behind: {traces.left()}")
