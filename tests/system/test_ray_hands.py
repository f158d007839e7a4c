"""The controller's hands in a real Ray: what outlives a controller, what ends with it, and how processes are ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from concertina.errors import InternalError
from concertina.orchestrator import remote
from concertina.orchestrator.config import NAMESPACE
from concertina.orchestrator.lifeline import Identity
from ray._private.state import actors
from ray.cluster_utils import Cluster

from .command import Process, wait_for
from .keeper import Keeper, keeper_of

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    """Two nodes, of this machine."""
    directory = tempfile.mkdtemp(prefix="ct-", dir="/tmp")  # Ray's Unix sockets lie below: a short path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", directory)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 80 << 20})
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        ray.init(cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def keeper(request: pytest.FixtureRequest) -> Iterator[Any]:
    name: str = request.node.name
    with keeper_of(name) as actor:
        yield actor


def process(pid: int) -> Process:
    found = Process.of(pid)
    assert found is not None
    return found


def start(keeper: Any, pool: str = "node-0") -> Process:
    """The process of an owner on the node that the pool is named after."""
    return process(remote.ask(keeper.start.remote(pool)))


def restart(keeper: Any) -> None:
    """Kill the keeper's process, and wait until Ray has started another one."""
    before = remote.ask(keeper.pid.remote())
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: bool(remote.ask_again(keeper.pid.remote) != before), lambda: "not restarted")


def test_state_stays_until_it_is_forgotten(keeper: Any) -> None:
    assert remote.ask(keeper.load.remote()) is None
    remote.ask(keeper.save.remote(b"\0one"))
    remote.ask(keeper.save.remote(b"\0two"))
    remote.ask(keeper.keep.remote(b"model"))
    restart(keeper)
    assert remote.ask_again(keeper.load.remote) == b"\0two"
    assert remote.ask(keeper.kept.remote()) == b"model"
    with keeper_of("test_state") as other:  # a name that begins alike
        assert remote.ask(other.load.remote()) is None
        remote.ask(other.sweep.remote())
    assert remote.ask(keeper.load.remote()) == b"\0two"
    remote.ask(keeper.forget.remote())
    assert remote.ask(keeper.load.remote()) is remote.ask(keeper.kept.remote()) is None


def test_a_restarted_controller_finds_what_it_has_started(keeper: Any) -> None:
    owners = {pool: start(keeper, pool) for pool in ("node-0", "node-1")}
    restart(keeper)
    pids = {pool: p.pid for pool, p in owners.items()}
    assert remote.ask_again(keeper.found.remote) == pids
    assert start(keeper, "node-0").pid == pids["node-0"]  # asked for again: the one that is there
    assert all(p.runs for p in owners.values())


def test_processes_end_with_a_controller_that_is_gone_for_good(keeper: Any) -> None:
    owner = start(keeper)
    ray.kill(keeper)
    wait_for(lambda: not owner.runs, lambda: "the owner runs on", 30)


def test_nothing_outlives_a_driver_that_is_killed(cluster: Cluster) -> None:
    command = [sys.executable, "-m", "tests.system.keeper", cluster.address, "driven"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        processes = [process(int(pid)) for pid in driver.stdout.readline().split()]
        assert len(processes) == 3
        driver.kill()
    wait_for(lambda: not any(p.runs for p in processes), lambda: f"left: {[p for p in processes if p.runs]}", 30)


def test_a_later_controller_of_the_same_name_is_another_one(keeper: Any, request: pytest.FixtureRequest) -> None:
    owner = start(keeper)
    ray.kill(keeper)
    with keeper_of(request.node.name):
        wait_for(lambda: not owner.runs, lambda: "the owner runs on", 30)


def test_what_an_earlier_deployment_left_is_swept_away(keeper: Any, request: pytest.FixtureRequest) -> None:
    owner = start(keeper)
    remote.ask(keeper.save.remote(b"old"))
    ray.kill(keeper)
    with keeper_of(request.node.name) as later:
        assert remote.ask(later.load.remote()) is None, "it is another controller's"
        remote.ask(later.sweep.remote())
        assert not owner.runs
        assert remote.ask(later.found.remote()) == {}
        assert remote.ask(later.load.remote()) is None
        assert start(later).pid != owner.pid


def test_a_call_that_waits_for_a_killed_process_fails(keeper: Any) -> None:
    owner = start(keeper)
    waiting = keeper.wait_on.remote("node-0")
    assert ray.wait([waiting], timeout=1.0)[0] == []
    os.kill(owner.pid, signal.SIGKILL)
    with pytest.raises(InternalError, match="node-0: its process ended"):
        remote.ask(waiting, 20)
    assert start(keeper).pid != owner.pid


def _stop(owner: Process) -> None:
    os.kill(owner.pid, signal.SIGSTOP)


def _leave(owner: Process) -> None:
    """As it is."""


@pytest.mark.parametrize("before", [_leave, _stop])
@pytest.mark.parametrize(("pool", "beside"), [("node-0", "node-1"), ("node-1", "node-0")])
def test_kill_returns_when_the_process_is_gone(
    keeper: Any, request: pytest.FixtureRequest, before: Callable[[Process], None], pool: str, beside: str
) -> None:
    owner, other = start(keeper, pool), start(keeper, beside)
    before(owner)
    remote.ask(keeper.kill.remote(f"{request.node.name}/{pool}"), 20)
    assert not owner.runs
    assert other.runs
    assert remote.ask(keeper.found.remote()) == {beside: other.pid}
    assert start(keeper, pool).pid != owner.pid


def test_whoever_has_a_process_has_begun(keeper: Any, request: pytest.FixtureRequest) -> None:
    start(keeper)
    assert remote.ask(keeper.begun.remote(f"{request.node.name}/node-0"))
    assert not remote.ask(keeper.begun.remote("nobody"))


@pytest.mark.parametrize("noted", [False, True])
def test_a_worker_that_hangs_while_it_starts_is_killed(
    keeper: Any, request: pytest.FixtureRequest, noted: bool
) -> None:
    """As soon as Ray has a process for it, and in its imports."""
    deployment, actor = request.node.name, f"worker/{request.node.name}/worker-0"
    starting = keeper.hire.remote(5.0)
    wait_for(lambda: bool(_pid(actor)) and (not noted or Identity.noted(deployment, actor) is not None), lambda: "none")
    worker = process(_pid(actor))
    _stop(worker)
    with pytest.raises(InternalError, match="worker-0 was started and gave no answer for 5 s; it was killed"):
        remote.ask(starting, 60)
    wait_for(lambda: not worker.runs, lambda: "the worker runs on")  # Ray takes five seconds where it has to do it
    assert _pid(actor) == 0


def _pid(actor: str) -> int:
    try:
        known = ray.get_actor(actor, NAMESPACE)
    except ValueError:
        return 0
    return int(actors(known._actor_id.hex()).get("Pid", 0))


def test_killing_nobody_is_no_error(keeper: Any) -> None:
    remote.ask(keeper.kill.remote("nobody"))


def test_a_controller_without_a_name_is_refused() -> None:
    """Nobody could tell whether it is still there."""
    kind: Any = ray.remote(Keeper)
    with pytest.raises(InternalError, match="named actor"):
        remote.ask(kind.options(num_cpus=0).remote("nameless").pid.remote())
