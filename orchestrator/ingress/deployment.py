"""The ingress as a Ray Serve application. Imports Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from ...errors import InternalError
from ..status import WorkerAddress
from .app import create_app
from .following import follow
from .members import Member, MemberSource, connect_worker
from .router import Router
from .settings import IngressSettings

NO_LIMIT = 100_000  # requests per replica; the ingress refuses what is too much itself, with 429


@dataclass(frozen=True)
class ActorMembers:
    """A `MemberSource`: asks a named actor for its ``members()``, a list of `WorkerAddress`, again and again.

    Parameters
    ----------
    actor, namespace : str
        Whom to ask; it may be restarted meanwhile.
    token : str
        The secret that its workers ask for.
    every_s : float
        Pause between two questions.
    """

    actor: str
    namespace: str
    token: str = field(repr=False)
    every_s: float = 0.5

    async def __call__(self) -> AsyncIterator[Sequence[Member]]:
        try:
            actor = await asyncio.to_thread(ray.get_actor, self.actor, self.namespace)
            while True:
                addresses: Sequence[WorkerAddress] = await actor.members.remote()
                yield [Member(a.worker, a.host, a.port, self.token) for a in addresses]
                await asyncio.sleep(self.every_s)
        except (ValueError, ray.exceptions.RayError) as e:
            raise InternalError(f"actor {self.actor!r} does not tell its members: {e}") from e


class Ingress:
    """One replica: application, router, and the task that follows the members."""

    def __init__(self, settings: IngressSettings, source: MemberSource) -> None:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("concertina").setLevel(logging.INFO)
        self._settings = settings
        self._source = source

    def __serve_build_asgi_app__(self) -> Any:  # Serve calls it in the replica's event loop
        settings = self._settings
        router = Router(connect_worker, settings.worker_wait_s, settings.recovery_timeout_s)
        self._following = asyncio.create_task(follow(router, self._source))
        return create_app(settings, router)


def build_ingress(settings: IngressSettings, source: MemberSource, replicas: int = 1) -> serve.Application:
    """An application for ``serve.run``.

    Parameters
    ----------
    settings : IngressSettings
    source : MemberSource
        Can be pickled, and called in each replica.
    replicas : int
        Each connects to every worker, and limits its own queue.
    """
    deployment: Any = serve.deployment(
        serve.ingress(None)(Ingress),
        name="ingress",
        num_replicas=replicas,
        max_ongoing_requests=NO_LIMIT,
        ray_actor_options={"num_cpus": 0},
        logging_config=LoggingConfig(enable_access_log=False),
    )
    application: serve.Application = deployment.bind(settings, source)
    return application
