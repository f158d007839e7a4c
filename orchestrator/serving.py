"""The driver of ``concertina serve``: Ray, controller, endpoint, and a clean end. Imports Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..errors import OperatorError
from ..workers.model_files import ModelFiles
from . import remote
from .config import NAMESPACE, DeploymentConfig
from .controller_actor import ControllerService, cause_of

_POLL_S = 0.2
_HEALTH_S = 1.0


def serve_until_stopped(config: DeploymentConfig, address: str | None, verbose: bool) -> None:
    """Serve until Ctrl-C, SIGTERM or a failure; leaves nothing behind.

    Raises
    ------
    OperatorError
        The checkpoint, the port, the cluster or the options do not allow it.
    """
    _check_port_free(config.endpoint.host, config.endpoint.port)
    if Path(config.checkpoint).exists():
        ModelFiles.open(config.checkpoint, config.dtype)
        config = replace(config, checkpoint=os.path.abspath(config.checkpoint))
    console = Console(stderr=True)
    stop = _stop_signals()
    try:
        started = remote.join_or_start(address, config.workers, verbose)
        with _controller(config) as controller:
            starting = controller.start.remote()
            with _endpoint(config):
                _bring_up(starting, controller, console)
                _announce(config, console, started)
                _watch(controller)
    except KeyboardInterrupt:
        console.print("concertina: stopped")
    finally:
        stop()
        ray.shutdown()


def _check_port_free(host: str, port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise OperatorError(f"port: cannot listen on {host}:{port} ({e.strerror}); choose another --port") from e


def _stop_signals() -> Callable[[], None]:
    """Turn the first SIGTERM into KeyboardInterrupt; returns what makes further signals harmless while ending."""

    def interrupt(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)

    def ignore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    return ignore


@contextlib.contextmanager
def _controller(config: DeploymentConfig) -> Iterator[Any]:
    name = remote.controller_name(config.name)
    try:
        actor: Any = ray.remote(ControllerService).options(name=name, namespace=NAMESPACE, num_cpus=0).remote(config)
        ray.get(actor.__ray_ready__.remote())
    except ValueError as e:
        raise OperatorError(f"name: a deployment called {config.name!r} already runs in this cluster") from e
    try:
        yield actor
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(actor.stop.remote(), timeout=10)
        ray.kill(actor)


def _bring_up(starting: Any, controller: Any, console: Console) -> None:
    """Show progress until the first generation serves; a failure is raised as it was."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=None)
        while not ray.wait([starting], timeout=_POLL_S)[0]:
            seen = ray.get(controller.progress.remote())
            total = seen.total_bytes or None
            progress.update(task, description=seen.phase, completed=seen.loaded_bytes, total=total)
    try:
        ray.get(starting)
    except ray.exceptions.RayTaskError as e:
        raise cause_of(e) from None


@contextlib.contextmanager
def _endpoint(config: DeploymentConfig) -> Iterator[None]:
    """The HTTP endpoint in Ray Serve; a Serve instance that was not there before is shut down with it."""
    from .ingress.deployment import build_ingress

    owns_serve = not _serve_runs()
    listen = {"host": config.endpoint.host, "port": config.endpoint.port}
    serve.start(http_options=listen, logging_config={"log_level": "WARNING"})
    try:
        serve.run(build_ingress(config, owns_serve), name=config.name, route_prefix="/")
        yield
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            serve.shutdown() if owns_serve else serve.delete(config.name)


def _serve_runs() -> bool:
    return any(a["namespace"] == "serve" for a in ray.util.list_named_actors(all_namespaces=True))


def _announce(config: DeploymentConfig, console: Console, started: bool) -> None:
    url = f"http://{config.endpoint.host}:{config.endpoint.port}/v1"
    where = "an embedded Ray" if started else "the running Ray cluster"
    console.print(
        f"[bold green]serving[/] {config.checkpoint} with {config.workers} workers in {where} at [bold]{url}[/]"
    )
    console.print("concertina status shows what runs; Ctrl-C ends everything")


def _watch(controller: Any) -> None:
    while True:
        ray.get(controller.check.remote())
        time.sleep(_HEALTH_S)
