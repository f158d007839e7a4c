"""What effects are carried out on, by name; what is gone raises `InternalError`. Knows no Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import InternalError
from ..workers.generation import PoolExtents
from .cluster import Cluster, Member, Pool
from .config import DeploymentConfig
from .core.state import Record, State


@dataclass(frozen=True, slots=True)
class Registry:
    """One deployment's processes and generations.

    Parameters
    ----------
    config : DeploymentConfig
    cluster : Cluster
    state : callable
        The state that effects are for.
    """

    config: DeploymentConfig
    cluster: Cluster
    state: Callable[[], State]

    def extents(self, pool: str, keys: Sequence[str] | None = None) -> PoolExtents:
        known = self.pool(pool)
        pages = known.pages if keys is None else {key: known.pages[key] for key in keys if key in known.pages}
        return PoolExtents(pool, known.source.address, self.config.token, pages)

    def node_host(self, node: str) -> str:
        if node not in self.cluster.nodes:
            raise InternalError(f"node {node} is gone")
        return self.cluster.nodes[node].host

    def record(self) -> Record:
        """The generation that is coming, else the one that serves."""
        state = self.state()
        record = state.pending.record if state.pending is not None else state.serving
        if record is None:
            raise InternalError("there is no generation")
        return record

    def wanted(self) -> dict[str, set[str]]:
        """Keys of extents that the generation that serves, or the one that is coming, needs, by their pool."""
        state, keys = self.state(), dict[str, set[str]]()
        for record in (state.serving, state.pending.record if state.pending is not None else None):
            for pool, requests in record.layout.extents(record.id).items() if record is not None else ():
                keys.setdefault(pool, set()).update(request.key for request in requests)
        return keys

    def serving(self) -> Record:
        serving = self.state().serving
        if serving is None:
            raise InternalError("no generation serves")
        return serving

    def pool_of_device(self, device: str) -> str:
        layout = self.serving().layout
        if device not in layout.devices:
            raise InternalError(f"device {device} has no part in generation {self.serving().id}")
        return layout.device_pool(layout.devices.index(device))

    def pool(self, name: str) -> Pool:
        if name not in self.cluster.pools:
            raise InternalError(f"memory owner {name}: its process ended")
        return self.cluster.pools[name]

    def worker(self, name: str) -> Member:
        if name not in self.cluster.workers:
            raise InternalError(f"{name}: its process ended")
        return self.cluster.workers[name]
