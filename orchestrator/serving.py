"""The driver of ``concertina serve``: Ray, controller, endpoint, and a clean end. Imports Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..workers.model_files import ModelFiles
from . import remote
from .config import DEFAULT_NAME, DeploymentConfig
from .controller_actor import launch
from .core.layout import Seat
from .endpoint import check_port_free, check_serve, opened
from .ingress.settings import IngressSettings
from .lifeline import Identity
from .planning import fitting_placement, max_model_len
from .ray_hands import end_all
from .status import bar_of
from .tokens import kept_token

_log = logging.getLogger(__name__)
_POLL_S = 0.2
_HEALTH_S = 1.0
_STOP_S = 10.0


def serve_until_stopped(config: DeploymentConfig, address: str | None, verbose: bool, token_given: bool) -> None:
    """Serve until Ctrl-C, SIGTERM or a failure; leaves nothing behind.

    ``token_given``: whoever may change the deployment has the token already.

    Raises
    ------
    OperatorError
        The checkpoint, the port, the cluster or the options do not allow it.
    """
    config = _absolute(config)
    model = ModelFiles.open(config.checkpoint, config.dtype)
    settings = _settings(config, model)
    if config.placement_file is not None:  # the controller reads it again; a mistake is told before Ray starts
        fitting_placement(config.placement_file, [Seat(f"cpu-{i}", "") for i in range(config.workers)], model)
    if address == remote.LOCAL:
        check_port_free(config.endpoint)  # else Ray Serve may be what listens there
    console = Console(stderr=True)
    stop = _stop_signals()
    try:
        started = remote.join_or_start(address, config.workers, verbose)
        _stop_signals()  # Ray has put its own in their place
        check_serve(config)
        with _controller(config) as controller:
            starting = controller.start.remote()
            # The file goes first at the end: a job that is stopped has three seconds, and Serve takes two and more.
            keeping = kept_token(config.name, config.token, needed=not token_given)
            with opened(config, settings, leave_serve=started) as endpoint, keeping:
                _bring_up(starting, endpoint.opening, controller, console)
                _announce(config, started)
                endpoint.stand_by()
                _watch(controller, config)
    except KeyboardInterrupt:
        console.print("concertina: stopped")
    except SystemExit as e:  # by Ray's own handler, while it starts
        if e.code != signal.SIGTERM:
            raise
        console.print("concertina: stopped")
    finally:
        stop()
        ray.shutdown()


def _absolute(config: DeploymentConfig) -> DeploymentConfig:
    """Paths as other processes of this machine understand them, wherever they run."""
    files = {name: getattr(config, name) for name in ("checkpoint", "placement_file", "loads_file")}
    return replace(config, **{name: os.path.abspath(path) for name, path in files.items() if path is not None})


def _settings(config: DeploymentConfig, model: ModelFiles) -> IngressSettings:
    endpoint = config.endpoint
    return IngressSettings(
        model_names=(endpoint.model_name or os.path.basename(config.checkpoint),),
        checkpoint=config.checkpoint,
        max_model_len=max_model_len(config, model),
        api_keys=endpoint.api_keys,
        max_waiting=config.engine.max_waiting,
    )


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
    actor = launch(config)
    try:
        yield actor
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(actor.stop.remote(), timeout=_STOP_S)
        ray.kill(actor)
        with contextlib.suppress(ray.exceptions.RayError):
            end_all(config.name)  # it may have died, or hang; the lifelines of its actors would take seconds


def _bring_up(starting: Any, opening: Future[None], controller: Any, console: Console) -> None:
    """Show progress until the first generation serves and the endpoint is open; a failure is raised as it was."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=None)
        while starting is not None or not opening.done():
            if opening.done():
                opening.result()  # if it failed, nobody need wait for the weights
            starting = _still_starting(starting, controller)
            seen = remote.ask_again(controller.progress.remote)
            done, total = bar_of(seen.loaded_bytes, seen.total_bytes)
            progress.update(task, description=seen.phase, completed=done, total=total)
    opening.result()


def _still_starting(starting: Any, controller: Any) -> Any:
    """What to wait for: the call, or another one if the controller was restarted; None once it has succeeded."""
    if starting is None:
        time.sleep(_POLL_S)
        return None
    if not ray.wait([starting], timeout=_POLL_S)[0]:
        return starting
    try:
        remote.ask(starting)
    except remote.Unavailable:
        return controller.start.remote()
    return None


def _announce(config: DeploymentConfig, started: bool) -> None:
    """On standard output, where scripts wait for it; everything else is told on standard error."""
    url = f"{config.endpoint.url}/v1"
    where = "an embedded Ray" if started else "the running Ray cluster"
    print(f"serving {config.checkpoint} with {config.workers} workers in {where} at {url}", flush=True)
    named = "" if config.name == DEFAULT_NAME else f" --name {config.name}"
    print(f"concertina status{named} shows what runs; Ctrl-C ends everything", flush=True)


def _watch(controller: Any, config: DeploymentConfig) -> None:
    """Return never; raise what ended the deployment, or that its controller stays away.

    One that hangs is ended, whenever it does so. Ray starts it again, and it goes on where it was.
    """
    there_s, ended = time.monotonic(), False
    while True:
        try:
            remote.ask(controller.alive.remote(), config.hang_timeout_s)
        except remote.Silent:
            if _end_controller(config.name) and not ended:  # its successor has as long again, but not for ever
                there_s, ended = time.monotonic(), True
        except remote.Unavailable:
            _log.info("the controller is being started again")
        try:  # it answers once it has taken its processes up again; if it hangs meanwhile, the next look finds it
            remote.ask(controller.check.remote(), config.hang_timeout_s)
            there_s, ended = time.monotonic(), False
        except remote.Unavailable:
            if time.monotonic() - there_s > config.hang_timeout_s + remote.PATIENCE_S:
                raise
        time.sleep(_HEALTH_S)


def _end_controller(deployment: str) -> bool:
    """End its process, which is of this node; whether that was done.

    One that is only starting has not been noted yet, and is let be.
    """
    process = Identity.noted(deployment, remote.controller_name(deployment))
    if process is None or not process.runs_here():
        return False
    _log.warning("the controller gives no answer: it is ended and started again")
    return process.end_here(0.0, _STOP_S)
