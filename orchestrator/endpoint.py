"""The HTTP endpoint of ``concertina serve`` in Ray Serve: opened, then doubled, then closed. Imports Ray."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.exceptions import RayServeException

from ..errors import OperatorError
from . import remote
from .config import NAMESPACE, DeploymentConfig, EndpointOptions
from .ingress.deployment import ActorMembers, Lifeline, build_ingress
from .ingress.second_door import open_second_door
from .ingress.settings import IngressSettings

_log = logging.getLogger(__name__)
_ASK_S = 5.0
_LEFTOVER_S, _LOOK_S = 30.0, 0.5  # that the endpoint of a killed driver may take to go
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
        self.owns_serve = _applications() is None
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
            alone = self.owns_serve and not set(_applications() or ()) - {self.config.name}
            serve.shutdown() if alone else serve.delete(self.config.name)
        with contextlib.suppress(ray.exceptions.RayError):
            if self._door is not None:
                ray.kill(self._door)

    def _open(self) -> None:
        """With one replica; the others can come when the machine has less to do."""
        listen = {"host": self.config.endpoint.host, "port": self.config.endpoint.port}
        try:
            serve.start(http_options=listen, logging_config={"log_level": "WARNING"})
            self._run(1, wait=True)
        except Exception as e:  # Serve has no class of its own for what does not start
            raise OperatorError(f"endpoint: it could not be opened: {self._why() or remote.one_line(e)}") from e

    def _why(self) -> str:
        """The last line of what Serve says of an ingress that does not start: the others are where, not why."""
        with contextlib.suppress(KeyError, ray.exceptions.RayError, RayServeException):
            ingress = serve.status().applications[self.config.name].deployments["ingress"]
            return ([line.strip() for line in ingress.message.splitlines() if line.strip()] or [""])[-1]
        return ""

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


def check_port_free(endpoint: EndpointOptions) -> None:
    """Raise `OperatorError` if nobody can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)[
            0
        ]
        with socket.socket(family, kind, protocol) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
    except UnicodeError as e:
        raise OperatorError(f"host: {endpoint.host!r}; expected an address or a name of this machine") from e
    except OSError as e:
        where = endpoint.url.removeprefix("http://")
        raise OperatorError(f"port: cannot listen on {where} ({e.strerror}); choose another --port") from e


def check_serve(config: DeploymentConfig) -> None:
    """Raise `OperatorError` if the endpoint cannot be opened as it was asked for.

    A Ray Serve that runs in this cluster has a port already, and perhaps an application. One of this deployment's name
    whose driver was killed goes by itself, which is waited for.
    """
    end_s = time.monotonic() + _LEFTOVER_S
    while (serves := _applications()) is not None and config.name in serves and not _has_controller(config.name):
        if time.monotonic() > end_s:
            raise OperatorError(f"endpoint: one of an earlier deployment called {config.name!r} does not go away")
        time.sleep(_LOOK_S)
    if serves is None:
        check_port_free(config.endpoint)
        return
    listens = _http_port()
    if listens != config.endpoint.port:
        raise OperatorError(
            f"port: {config.endpoint.port}: Ray Serve runs in this cluster already; expected its port, {listens} "
            "(or give --address local, which starts another Ray)"
        )
    others = [name for name, prefix in serves.items() if prefix == "/" and name != config.name]
    if others:
        raise OperatorError(
            f"endpoint: application {others[0]!r} answers in this cluster; a cluster has one endpoint: end that one, "
            "or give --address local, which starts another Ray"
        )


def _applications() -> dict[str, str] | None:
    """Serve's applications and the prefixes of their routes; None if Serve does not run."""
    try:
        found = _ask_serve("get_serve_instance_details")["applications"]
    except (ValueError, ray.exceptions.RayActorError):  # it was not, or is no longer
        return None
    except ray.exceptions.RayError as e:
        raise _no_answer(e) from e
    return {name: application["route_prefix"] for name, application in found.items()}


def _http_port() -> int:
    try:
        port: int = _ask_serve("get_http_config").port
    except (ValueError, ray.exceptions.RayError) as e:
        raise _no_answer(e) from e
    return port


def _no_answer(error: Exception) -> OperatorError:
    return OperatorError(f"endpoint: Ray Serve runs in this cluster and gives no answer: {remote.one_line(error)}")


def _ask_serve(call: str) -> Any:
    """Ask its controller itself: a client of Serve's would be kept, also when that controller is gone."""
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    return ray.get(getattr(controller, call).remote(), timeout=_ASK_S)


def _has_controller(deployment: str) -> bool:
    try:
        remote.find_controller(deployment)
    except OperatorError:
        return False
    return True
