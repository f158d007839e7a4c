"""Reaching a Ray cluster and a deployment in it from a command or a script. Imports Ray."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import ray
from ray._private.services import find_gcs_addresses

from ..errors import InternalError, OperatorError
from .config import NAMESPACE
from .status import DeploymentStatus

LOCAL = "local"
EMBEDDED = "concertina-embedded"  # resource of the only node of a Ray that nobody else is to join
_LOG_LEVEL = logging.ERROR
_CONTROLLER = "controller/"
_KNOCK_S = 5.0
PATIENCE_S = 60.0
_AGAIN_S = 0.2
_REFUSALS = (OSError, ValueError, RuntimeError, ray.exceptions.RayError)  # by `ray.init`


class Unavailable(InternalError):
    """An actor does not answer now: Ray may be starting it again."""


class Silent(Unavailable):
    """A call got no answer in its time: the process may hang."""


def controller_name(deployment: str) -> str:
    """Name of a deployment's controller actor in Ray."""
    return _CONTROLLER + deployment


def connect_to(address: str | None) -> None:
    """Join a running cluster.

    Raises
    ------
    OperatorError
        No cluster answers there.
    """
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    if where == LOCAL:
        raise OperatorError(f"address: {LOCAL!r} would start another Ray; expected that of a running one, host:port")
    try:
        _knock(where)
        ray.init(where, namespace=NAMESPACE, log_to_driver=False, logging_level=_LOG_LEVEL)
    except _REFUSALS as e:
        raise OperatorError(
            f"address: no Ray cluster answers at {where!r} ({one_line(e)}); "
            "start one with concertina serve or ray start --head"
        ) from e


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _knock(address: str) -> None:
    """Raise `OSError` if ``address`` is a host and a port at which nobody listens: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_S).close()


def join_or_start(address: str | None, workers: int, verbose: bool) -> bool:
    """Join the cluster that runs here, or start an embedded one; True if it was started.

    ``address`` ``"local"`` always starts one; any other value must answer.

    Raises
    ------
    OperatorError
        No cluster answers there, or none could be started.
    """
    if (address or os.environ.get("RAY_ADDRESS")) != LOCAL:
        if address or os.environ.get("RAY_ADDRESS"):
            connect_to(address)
            return False
        try:
            ray.init("auto", namespace=NAMESPACE, log_to_driver=verbose, logging_level=_LOG_LEVEL)
            return False
        except ConnectionError:
            logging.getLogger(__name__).info("no Ray cluster runs here: starting an embedded one")
        except _REFUSALS as e:
            raise OperatorError(
                f"address: the Ray cluster that runs here cannot be joined ({one_line(e)}); "
                "--address local starts another one"
            ) from e
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 puts what serves behind every process that starts
    try:
        ray.init(
            LOCAL,
            namespace=NAMESPACE,
            num_cpus=max(workers, os.cpu_count() or 1),
            resources={EMBEDDED: 1},
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=verbose,
            logging_level=_LOG_LEVEL,
        )
    except Exception as e:  # Ray has no class of its own for a start that fails
        first = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise OperatorError(f"address: no embedded Ray could be started here: {first}") from e
    return True


def find_controller(deployment: str) -> Any:
    """Handle of a running deployment's controller.

    Raises
    ------
    OperatorError
        No deployment of that name runs in this cluster.
    """
    try:
        return ray.get_actor(controller_name(deployment), namespace=NAMESPACE)
    except ValueError:
        running = [name.removeprefix(_CONTROLLER) for name in _controllers()]
        there = f"running here: {', '.join(running)}" if running else "none runs in this cluster"
        others = sorted(find_gcs_addresses() - {ray.get_runtime_context().gcs_address})
        elsewhere = f"; other Rays run on this machine (--address): {', '.join(others)}" if others else ""
        raise OperatorError(f"name: no deployment called {deployment!r}; {there}{elsewhere}") from None
    except ray.exceptions.RayError as e:
        raise OperatorError(f"address: the Ray cluster does not answer, or has ended: {one_line(e)}") from e


def _controllers() -> list[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [a["name"] for a in actors if a["namespace"] == NAMESPACE and a["name"].startswith(_CONTROLLER)]


def ask(reference: Any, timeout_s: float | None = None) -> Any:
    """The result of a remote call; what it raised is raised as it was there.

    Raises
    ------
    Unavailable
        Nothing has answered, in ``timeout_s`` or because the process that was called has ended and starts again.
    InternalError
        The process that was called has ended for good, or its cluster.
    """
    try:
        return ray.get(reference, timeout=None if timeout_s == math.inf else timeout_s)
    except ray.exceptions.RayTaskError as e:
        raise e.cause from None
    except ray.exceptions.GetTimeoutError as e:
        raise Silent(f"a process of the deployment does not answer: {one_line(e)}") from e
    except ray.exceptions.ActorUnavailableError as e:
        raise Unavailable(f"a process of the deployment does not answer: {one_line(e)}") from e
    except ray.exceptions.RayActorError as e:
        raise InternalError(f"a process of the deployment has ended: {one_line(e)}") from e
    except ray.exceptions.RayError as e:
        raise InternalError(f"the Ray cluster does not answer, or has ended: {one_line(e)}") from e


def ask_again(call: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """The result of ``call()``, a remote call that may be made twice, through a restart of the actor that it asks.

    Raises
    ------
    Unavailable
        Nothing has answered for ``patience_s``.
    InternalError
        The process that was called has ended for good.
    """
    end_s = time.monotonic() + patience_s
    while True:
        try:
            return ask(call(), max(0.0, end_s - time.monotonic()))
        except Unavailable:
            if time.monotonic() + _AGAIN_S >= end_s:
                raise
            time.sleep(_AGAIN_S)


def deployment_status(deployment: str) -> DeploymentStatus:
    """A picture of a running deployment."""
    status: DeploymentStatus = ask_again(find_controller(deployment).status.remote)
    return status
