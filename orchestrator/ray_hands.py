"""The controller's hands in a Ray cluster: owners and workers as actors on chosen nodes, state in its store of keys."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from math import inf
from typing import Any, cast

import ray
from ray._private.state import actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import InternalError, Unreachable
from ..workers.owner_roles import OwnerConfig
from ..workers.roles import WorkerConfig
from .actors import OwnerActor, WorkerActor
from .config import NAMESPACE
from .durable import Durable
from .hands import Existing, NodeInfo, OwnerHandle, WorkerHandle
from .knocking import Knocking
from .lifeline import Identity, Lifeline
from .remote import EMBEDDED

_log = logging.getLogger(__name__)
_OPTIONS: Any = {
    "namespace": NAMESPACE,
    "lifetime": "detached",
    "get_if_exists": True,  # the controller may have died between starting it and noting it
    "max_restarts": 0,
    "max_concurrency": 16,
    "num_cpus": 0,  # the controller has counted cores itself
}
_OWNER, _WORKER = "owner/", "worker/"
_GRACE_S = 0.2  # what a process that can end takes; Ray itself would give one that hangs five seconds
_END_S = 10.0
_FRESH_S = 0.25


class _Handle:
    """An actor whose methods are awaited as those of a local object.

    A dead one raises `InternalError`, one that cannot be reached `Unreachable`; ``unreached`` is called then, too.
    """

    def __init__(self, actor: Any, what: str, unreached: Callable[[], None]) -> None:
        self._actor = actor
        self._what = what
        self._unreached = unreached

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._actor, name)

        async def call(*args: object) -> Any:
            try:
                return await method.remote(*args)
            except ray.exceptions.RayTaskError as e:
                raise e.cause from None
            except ray.exceptions.ActorDiedError as e:
                self._unreached()
                raise InternalError(f"{self._what}: its process ended") from e
            except ray.exceptions.RayError as e:
                self._unreached()
                raise Unreachable(f"{self._what}: cannot be reached: {str(e).splitlines()[0]}") from e

        return call


class RayHands:
    """`Hands` over the Ray cluster, for the named actor in whose process it is made.

    Parameters
    ----------
    deployment : str
        Its actors are called ``owner/<deployment>/<pool>`` and ``worker/<deployment>/<worker>``.
    """

    def __init__(self, deployment: str) -> None:
        context = ray.get_runtime_context()
        self._deployment = deployment
        self._node: str = context.get_node_id()
        self._controller = _named(context.get_actor_name()), _named(context.get_actor_id())
        self._durable = Durable(deployment)
        actor = self._controller[1]  # the same when its process is started again
        self._state_key, self._model_key = f"state/{actor}", f"model/{actor}"
        self._knocking = Knocking()
        self._nodes: list[NodeInfo] = []
        self._nodes_s = -inf  # when they were looked at
        self._looking = asyncio.Lock()
        self._store: Any = None

    async def nodes(self, *, anew: bool = False) -> list[NodeInfo]:
        """Nodes that Ray takes to be alive, and whose raylet listens; they are asked anew after a moment."""
        async with self._looking:  # an older look must not come behind a newer one
            if not anew and self._nodes and time.monotonic() - self._nodes_s < _FRESH_S:
                return self._nodes
            self._nodes_s = time.monotonic()  # before: who fails meanwhile is not forgotten
            alive = [n for n in await asyncio.to_thread(ray.nodes) if n["Alive"]]
            listening = await self._knocking.answering([_raylet(n) for n in alive])
            self._nodes = [_node_info(n) for n in alive if _raylet(n) in listening]
            return self._nodes

    def _doubt(self) -> None:
        """A call has failed: look at everybody anew."""
        self._nodes_s = -inf
        self._knocking.doubt()

    async def start_owner(self, node: str, config: OwnerConfig, adopt_from: str | None = None) -> OwnerHandle:
        actor = await asyncio.to_thread(self._start, OwnerActor, _OWNER + config.name, node, config, adopt_from)
        return self._owner(config.name, actor)

    async def start_worker(self, node: str, config: WorkerConfig) -> WorkerHandle:
        actor = await asyncio.to_thread(self._start, WorkerActor, self._actor_name(config.name), node, config)
        return self._worker(config.name, actor)

    def _owner(self, name: str, actor: Any) -> OwnerHandle:
        return cast(OwnerHandle, _Handle(actor, f"memory owner {name}", self._doubt))

    def _worker(self, name: str, actor: Any) -> WorkerHandle:
        return cast(WorkerHandle, _Handle(actor, name, self._doubt))

    def _start(self, kind: type, name: str, node: str, *args: object) -> Any:
        lifeline = Lifeline(self._deployment, name, *self._controller)
        actor: Any = ray.remote(kind)
        return actor.options(**_OPTIONS, name=name, scheduling_strategy=_on(node)).remote(lifeline, *args)

    def _actor_name(self, worker: str) -> str:
        return f"{_WORKER}{self._deployment}/{worker}"

    async def existing(self) -> Existing:
        owners, workers = {}, {}
        for name, (node, actor) in (await asyncio.to_thread(self._existing)).items():
            if name.startswith(_OWNER):
                owner = name.removeprefix(_OWNER)
                owners[owner] = self._owner(owner, actor)
            else:
                worker = name.removeprefix(self._actor_name(""))
                workers[worker] = node, self._worker(worker, actor)
        return Existing(owners, workers)

    def _existing(self) -> dict[str, tuple[str, Any]]:
        """Node and actor by its name. One that has not begun holds nothing yet, and is ended."""
        found = {}
        for name, actor in _actors(self._deployment):
            identity = Identity.noted(self._deployment, name)
            if identity is None:
                ray.kill(actor)
            else:
                found[name] = identity.node, actor
        return found

    async def begun(self, name: str) -> bool:
        names = (_OWNER + name, self._actor_name(name))
        return await asyncio.to_thread(lambda: any(map(_has_process, names)))

    async def kill(self, name: str) -> None:
        """End the process of an owner or a worker, however it is; returns when it is gone.

        One that hangs before it has noted who it is holds nothing yet: Ray ends it, in five seconds.

        Raises
        ------
        InternalError
            It cannot be seen to end: its node does not answer.
        """
        for actor in (_OWNER + name, self._actor_name(name)):
            await self._kill(actor)

    async def sweep(self) -> None:
        """End and forget what an earlier deployment of this name has left."""
        left = await asyncio.to_thread(lambda: [name for name, _ in _actors(self._deployment)])
        await asyncio.gather(*(self._kill(name) for name in left))
        await asyncio.to_thread(self._durable.clear)

    async def _kill(self, name: str) -> None:
        identity = await asyncio.to_thread(Identity.noted, self._deployment, name)
        await asyncio.to_thread(_end_actor, name)
        if identity is not None:
            await self._end(identity)
            await asyncio.to_thread(Identity.strike, self._deployment, name)

    async def _end(self, identity: Identity) -> None:
        """Ray has forgotten the actor, but waits for a process that is stopped before it kills it."""
        if identity.node == self._node:
            gone = await asyncio.to_thread(identity.end_here, _GRACE_S, _END_S)
        else:
            gone = await self._end_there(identity)
        if not gone:
            raise InternalError(f"process {identity.pid} of node {identity.node} does not end")

    async def _end_there(self, identity: Identity) -> bool:
        """A node that is gone has taken its processes with it."""
        alive = {node.id for node in await self.nodes()}
        if identity.node not in alive:
            return True
        end: Any = ray.remote(Identity.end_here)
        task = end.options(num_cpus=0, max_retries=0, scheduling_strategy=_on(identity.node))
        try:
            return bool(await asyncio.wait_for(task.remote(identity, _GRACE_S, _END_S), 2 * _END_S))
        except (TimeoutError, ray.exceptions.RayError) as e:
            _log.warning("cannot end process %d of node %s: %s", identity.pid, identity.node, e)
            return False

    async def open_store(self) -> tuple[str, int]:
        host: str = ray.util.get_node_ip_address()
        self._store = await asyncio.to_thread(_tcp_store, host)
        return host, self._store.port

    async def save(self, state: bytes) -> None:
        await asyncio.to_thread(self._durable.put, self._state_key, state)

    async def load(self) -> bytes | None:
        return await asyncio.to_thread(self._durable.get, self._state_key)

    async def keep(self, model: bytes) -> None:
        await asyncio.to_thread(self._durable.put, self._model_key, model)

    async def kept(self) -> bytes | None:
        return await asyncio.to_thread(self._durable.get, self._model_key)

    async def forget(self) -> None:
        for key in (self._state_key, self._model_key):
            await asyncio.to_thread(self._durable.remove, key)

    def now_s(self) -> float:
        return time.monotonic()


def end_all(deployment: str) -> None:
    """End and forget every owner and worker of a deployment whose controller is gone, without waiting."""
    for _, actor in _actors(deployment):
        ray.kill(actor)
    Durable(deployment).clear()


def _actors(deployment: str) -> Iterator[tuple[str, Any]]:
    """Owners and workers of a deployment that Ray knows."""
    ours = tuple(f"{kind}{deployment}/" for kind in (_OWNER, _WORKER))
    for known in ray.util.list_named_actors(all_namespaces=True):
        name = known["name"]
        if known["namespace"] == NAMESPACE and name.startswith(ours):
            actor = _find(name)
            if actor is not None:
                yield name, actor


def _raylet(node: Any) -> tuple[str, int]:
    return node["NodeManagerAddress"], node["NodeManagerPort"]


def _node_info(node: Any) -> NodeInfo:
    """An embedded node needs to be reached from nowhere else."""
    resources = node["Resources"]
    host = "127.0.0.1" if EMBEDDED in resources else node["NodeManagerAddress"]
    return NodeInfo(node["NodeID"], host, int(resources.get("CPU", 1)), int(resources.get("memory", 0)))


def _tcp_store(host: str) -> Any:
    """Beside the event loop: importing torch takes seconds, in which nobody would get an answer."""
    import torch.distributed as dist

    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)


def _find(name: str) -> Any:
    try:
        return ray.get_actor(name, NAMESPACE)
    except ValueError:
        return None


def _has_process(name: str) -> bool:
    """Ray's own table, which `ray.util.state` would need a dashboard for: a number of 0 is no process yet."""
    actor = _find(name)
    return actor is not None and bool(actors(actor._actor_id.hex()).get("Pid"))


def _end_actor(name: str) -> None:
    actor = _find(name)
    if actor is not None:
        ray.kill(actor)


def _named(name: str | None) -> str:
    """Without a name nobody could tell whether the controller is still there."""
    if not name:
        raise InternalError("the controller must be a named actor of Ray")
    return name


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)
