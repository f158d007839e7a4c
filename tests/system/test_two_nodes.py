"""A cluster of two Ray nodes: pools per node, the exchange through gloo, experts moved while requests run."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from concertina.orchestrator import remote
from concertina.orchestrator.config import NAMESPACE, DeploymentConfig, EngineOptions
from concertina.orchestrator.controller_actor import launch
from concertina.orchestrator.status import DeploymentStatus
from concertina.workers.client import WorkerClient
from concertina.workers.protocol import EngineRequest, SamplingParams
from ray.cluster_utils import Cluster

from ..checkpoints import make_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NEW_TOKENS = 24


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 80 << 20})
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def all_on_the_first_device(checkpoint: Path, path: Path) -> Path:
    """As lopsided as a placement of three devices can be: any plan for the measured loads is better."""
    model = json.loads((checkpoint / "config.json").read_text())
    layer = [[{"device": 0, "slot": e, "share": 1.0}] for e in range(model["num_experts"])]
    layers = [layer] * model["num_hidden_layers"]
    path.write_text(json.dumps({"devices": ["a", "b", "c"], "layers": layers}))
    return path


def start(config: DeploymentConfig) -> Any:
    actor = launch(config)
    remote.ask(actor.start.remote())
    return actor


async def greedy(clients: list[WorkerClient], tag: str) -> list[list[int]]:
    """Twelve prompts at once, spread over the workers."""

    async def one(k: int) -> list[int]:
        request = EngineRequest(
            f"{tag}.{k}", tuple(range(3 + k, 40 + k)), SamplingParams(NEW_TOKENS, temperature=0.0, ignore_eos=True)
        )
        outputs = [output async for output in clients[k % len(clients)].submit(request)]
        return [token for output in outputs for token in output.token_ids]

    return await asyncio.gather(*(one(k) for k in range(12)))


async def run(config: DeploymentConfig, actor: Any) -> tuple[set[int], DeploymentStatus]:
    """Generations seen while the same requests come again and again, each time with the same answer."""
    members = remote.ask(actor.members.remote())
    clients = [await WorkerClient.connect(m.host, m.port, config.token) for m in members.workers]
    first = await greedy(clients, "first")
    assert all(len(tokens) == NEW_TOKENS for tokens in first)
    seen, end_s = set(), time.monotonic() + 60
    while time.monotonic() < end_s and len(seen) < 2:
        assert await greedy(clients, f"{time.monotonic()}") == first
        status = remote.ask(actor.status.remote())
        assert status.phase.startswith("serving"), status.detail  # or just going to the next generation
        seen.add(status.generation)
    for client in clients:
        await client.close()
    return seen, status


def test_three_workers_on_two_nodes_rebalance_while_serving(tmp_path: Path, cluster: Cluster) -> None:
    checkpoint = make_checkpoint("olmoe", tmp_path / "model")
    engine = EngineOptions(max_model_len=128, threads=1)
    config = DeploymentConfig(
        str(checkpoint),
        workers=3,
        placement_file=str(all_on_the_first_device(checkpoint, tmp_path / "placement.json")),
        spare_slots=4,
        rebalance_s=2.0,
        engine=engine,
    )
    actor = start(config)
    seen, status = asyncio.run(run(config, actor))
    assert status.exchange == "gloo"
    assert len({w.node for w in status.workers}) == 2
    assert {p.name.split("/")[0] for p in status.pools} == {"node"}
    assert len(status.pools) == 2
    for pool in status.pools:
        assert sum(pool.by_purpose.values()) == pool.pages
        assert pool.by_purpose["trunk"] > 0
    assert len(seen) == 2, f"experts did not move: {seen}"
    assert all(sum(w.experts_per_layer) > 0 for w in status.workers)
    remote.ask(actor.stop.remote())
