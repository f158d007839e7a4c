"""A second process that holds clients' connections, beside Serve's own proxy of this node. Imports Ray Serve.

Serve looks at a proxy every ten seconds and replaces it after three looks in vain; until then nobody would listen.
Both listen at the same port, and the kernel shares connections out among those who do.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.schema import LoggingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_SERVE = "serve"  # namespace in which replicas look for the proxy that a request came through


def open_second_door(deployment: str, host: str, port: int) -> Any:
    """Listen at this node, too; returns an actor, which ends with its handle or this driver.

    Ray starts its process again when it dies.
    """
    from ray.serve._private.proxy import ProxyActor  # here, because Ray has no public way to start one

    node = ray.get_runtime_context().get_node_id()
    options: dict[str, Any] = {
        "name": f"door/{deployment}",
        "namespace": _SERVE,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_concurrency": 1_000_000,  # as Serve's own: a call per request waits in it
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }
    kind: Any = ProxyActor
    door = kind.options(**options).remote(
        HTTPOptions(host=host, port=port),
        grpc_options=gRPCOptions(),
        node_id=node,
        node_ip_address=ray.util.get_node_ip_address(),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    ray.get(door.ready.remote())
    return door
