"""The ingress as a Ray Serve application. Imports Ray."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from ...errors import InternalError
from ..durable import Durable
from ..status import MemberList
from .app import create_app
from .first_replica import FirstReplica
from .following import follow
from .members import Member, MemberSource, Roster, connect_worker
from .router import Router
from .settings import IngressSettings

_log = logging.getLogger(__name__)
NO_LIMIT = 100_000  # requests per replica; the ingress refuses what is too much itself, with 429
HEALTH_S = 1.0  # how soon Serve notices that a replica's process has ended


@dataclass(frozen=True)
class ActorMembers:
    """A `MemberSource`: asks a named actor for its `MemberList` again and again, by ``members(seen)``.

    The actor answers once the list's version is not ``seen`` any more, or after some seconds.

    Parameters
    ----------
    actor, namespace : str
        Whom to ask; it may be restarted meanwhile.
    token : str
        The secret that its workers ask for.
    timeout_s : float
        An answer that takes longer does not come.
    """

    actor: str
    namespace: str
    token: str = field(repr=False)
    timeout_s: float = 30.0

    async def __call__(self) -> AsyncIterator[Roster]:
        seen = -1
        try:
            # Anew each time: a handle to an actor that was killed and made again stays dead.
            actor = await asyncio.to_thread(ray.get_actor, self.actor, self.namespace)
            while True:
                async with asyncio.timeout(self.timeout_s):
                    listed: MemberList = await actor.members.remote(seen)
                yield self._roster(listed)  # known or not: versions may begin again when the actor does
                seen = listed.version
        except (ValueError, ray.exceptions.RayError) as e:
            raise InternalError(f"actor {self.actor!r} does not tell its members: {e}") from e

    def _roster(self, listed: MemberList) -> Roster:
        members = (Member(a.worker, a.host, a.port, self.token, a.speed, a.draining, a.device) for a in listed.workers)
        return Roster(tuple(members), listed.awaited, listed.heirs)


@dataclass(frozen=True)
class Lifeline:
    """Whose end ends this application: a driver that was killed cannot take its endpoint away itself.

    Parameters
    ----------
    actor, namespace, actor_id : str
        Gone for good once Ray does not know it any more. An actor that restarts keeps its id; another one of its name
        has an application of its own.
    application : str
        What to delete then.
    with_serve : bool
        Whether Serve was started for this application, and is shut down with it.
    """

    actor: str
    namespace: str
    actor_id: str
    application: str
    with_serve: bool
    every_s: float = 2.0

    def watch(self) -> None:
        """Return never, or after the end; for a thread of its own."""
        while self._find() == self.actor_id or self._find_later() == self.actor_id:  # one answer may be late
            time.sleep(self.every_s)
        if self._find() is not None:  # it takes the application over by running it
            _log.warning("actor %r is another one now: application %r is its", self.actor, self.application)
            return
        _log.warning("actor %r is gone: deleting application %r", self.actor, self.application)
        try:
            Durable(self.application).clear()
        except Exception as e:  # noqa: BLE001 - the endpoint goes all the same
            _log.warning("what was kept of %r stays in the cluster: %s", self.application, e)
        others = set(serve.status().applications) - {self.application}
        if self.with_serve and not others:
            serve.shutdown()
        else:
            serve.delete(self.application, _blocking=False)

    def _find_later(self) -> str | None:
        time.sleep(self.every_s)
        return self._find()

    def _find(self) -> str | None:
        """The id of the actor of that name; the one that is meant if nobody can say."""
        try:
            return str(ray.get_actor(self.actor, self.namespace)._actor_id.hex())
        except ValueError:
            return None
        except ray.exceptions.RayError as e:
            _log.warning("whether actor %r lives is not known: %s", self.actor, e)
            return self.actor_id


class Ingress:
    """One replica: application, router, and the task that follows the members."""

    def __init__(self, settings: IngressSettings, source: MemberSource, lifeline: Lifeline | None) -> None:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("concertina").setLevel(logging.INFO)
        self._settings = settings
        self._source = source
        if lifeline is not None:
            threading.Thread(target=lifeline.watch, name="lifeline", daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:  # Serve calls it in the replica's event loop
        settings = self._settings
        router = Router(connect_worker, settings.worker_wait_s, settings.recovery_timeout_s)
        self._following = asyncio.create_task(follow(router, self._source))
        return create_app(settings, router)


def build_ingress(
    settings: IngressSettings, source: MemberSource, replicas: int = 1, lifeline: Lifeline | None = None
) -> serve.Application:
    """An application for ``serve.run``.

    Parameters
    ----------
    settings : IngressSettings
    source : MemberSource
        Can be pickled, and called in each replica.
    replicas : int
        One answers, and the others stand by, connected to every worker. Running the application again with another
        number lets those that are there be.
    lifeline : Lifeline, optional
        Ends the application when what it serves is gone.
    """
    eldest: Any = FirstReplica
    deployment: Any = serve.deployment(
        serve.ingress(None)(Ingress),
        name="ingress",
        num_replicas=replicas,
        max_ongoing_requests=NO_LIMIT,
        health_check_period_s=HEALTH_S,
        request_router_config=RequestRouterConfig(request_router_class=eldest),
        ray_actor_options={"num_cpus": 0},
        logging_config=LoggingConfig(enable_access_log=False),
    )
    # Else Serve would take every run for new code; for it, that of another deployment must be.
    version = lifeline.actor_id if lifeline is not None else "1"
    deployment = deployment.options(version=version, _internal=True)
    application: serve.Application = deployment.bind(settings, source, lifeline)
    return application
