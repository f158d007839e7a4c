"""The HTTP endpoint of ``concertina serve`` in Ray Serve: opened, then doubled, then closed. Imports Ray."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from ..errors import OperatorError
from . import remote
from .config import NAMESPACE, DeploymentConfig
from .ingress.deployment import ActorMembers, Lifeline, build_ingress
from .ingress.second_door import open_second_door
from .ingress.settings import IngressSettings

_log = logging.getLogger(__name__)
_AFTER_S = 10.0  # whoever has just started it asks at once, and two more processes take their seconds of CPU


class Endpoint:
    """Serve's proxy holds clients' connections, and a replica of the ingress answers.

    Attributes
    ----------
    opening : Future
        Done when both do.
    """

    def __init__(self, config: DeploymentConfig, settings: IngressSettings, pool: Executor) -> None:
        self.config, self.settings = config, settings
        self.controller_id: str = remote.find_controller(config.name)._actor_id.hex()
        self.owns_serve = not _serve_runs()
        self.opening: Future[None] = pool.submit(self._open)
        self._pool, self._ending = pool, threading.Event()
        self._door: Any = None

    def stand_by(self) -> None:
        """Have a second one of everything that dies with clients' connections, soon, in the background."""
        if self.config.endpoint.replicas > 1:
            self._pool.submit(self._double)

    def end(self) -> None:
        """Start nothing more."""
        self._ending.set()

    def close(self) -> None:
        """Take it away, and Serve with it if that was started for it and nobody else uses it."""
        with contextlib.suppress(ray.exceptions.RayError):
            others = set(serve.status().applications) - {self.config.name}
            serve.shutdown() if self.owns_serve and not others else serve.delete(self.config.name)
        with contextlib.suppress(ray.exceptions.RayError):
            if self._door is not None:
                ray.kill(self._door)

    def _open(self) -> None:
        """With one replica; the others can come when the machine has less to do."""
        listen = {"host": self.config.endpoint.host, "port": self.config.endpoint.port}
        try:
            serve.start(http_options=listen, logging_config={"log_level": "WARNING"})
            self._run(1, wait=True)
        except Exception as e:  # Serve has no class of its own for what does not start, and wraps why it did not
            reason = (str(e).strip() or type(e).__name__).splitlines()[-1]
            raise OperatorError(f"endpoint: it could not be opened: {reason}") from e

    def _double(self) -> None:
        if self._ending.wait(_AFTER_S):
            return
        try:
            self._door = open_second_door(self.config.name, self.config.endpoint.host, self.config.endpoint.port)
            if not self._ending.is_set():
                self._run(self.config.endpoint.replicas, wait=False)
        except Exception as e:  # noqa: BLE001 - it serves all the same
            _log.warning("the endpoint has no second process: %s", e)

    def _run(self, replicas: int, wait: bool) -> None:
        name, actor = self.config.name, remote.controller_name(self.config.name)
        source = ActorMembers(actor, NAMESPACE, self.config.token)
        lifeline = Lifeline(actor, NAMESPACE, self.controller_id, name, self.owns_serve)
        application = build_ingress(self.settings, source, replicas, lifeline)
        serve.run_many([serve.RunTarget(application, name, "/")], wait_for_applications_running=wait)


@contextlib.contextmanager
def opened(config: DeploymentConfig, settings: IngressSettings, leave_serve: bool) -> Iterator[Endpoint]:
    """The endpoint, opening beside the start of the workers.

    A Serve instance that was not there before is shut down with it, unless the cluster ends anyway (``leave_serve``).
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with ThreadPoolExecutor(1, "endpoint") as pool:
        endpoint = Endpoint(config, settings, pool)
        try:
            yield endpoint
        finally:
            endpoint.end()
            if endpoint.opening.done():  # else what opens it ends when it is taken away
                pool.shutdown()
            if not leave_serve:
                endpoint.close()


def check_serve(config: DeploymentConfig, taken: OperatorError | None) -> None:
    """Raise `OperatorError` if the Ray Serve that runs in this cluster cannot open the endpoint as it was asked for.

    ``taken`` is what is wrong with the port, unless Serve itself listens there.
    """
    if not _serve_runs():
        if taken is not None:
            raise taken
        return
    client: Any = _get_global_client()
    listens = client.http_config.port
    if listens != config.endpoint.port:
        raise OperatorError(
            f"port: {config.endpoint.port}: Ray Serve runs in this cluster already; expected its port, {listens} "
            "(or give --address local, which starts another Ray)"
        )
    for name, application in client.get_serve_details()["applications"].items():
        if application["route_prefix"] == "/" and name != config.name:
            raise OperatorError(
                f"endpoint: application {name!r} answers in this cluster; a cluster has one endpoint: end that one, or "
                "give --address local, which starts another Ray"
            )


def _serve_runs() -> bool:
    return any(a["namespace"] == "serve" for a in ray.util.list_named_actors(all_namespaces=True))
