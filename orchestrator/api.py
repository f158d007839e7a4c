"""A running deployment as Python sees it: what an autoscaler, an operator or a script calls. Imports Ray.

from concertina.orchestrator.api import Deployment

deployment = Deployment("concertina")
operation = deployment.scale(3, wait=True)
"""

from __future__ import annotations

import time
from math import inf
from typing import Any, Literal, overload

import ray

from . import remote
from .config import DEFAULT_NAME
from .preview import Preview
from .status import DeploymentStatus, OperationStatus
from .tokens import WrongToken, find_token, where_found

_POLL_S = 5.0  # the controller answers at once when something changes
_LEAST_PATIENCE_S = 5.0
_TWICE = frozenset({"scale", "rebalance", "operation"})  # asking for the same twice is asking for it once


class Deployment:
    """One deployment of a Ray cluster.

    Parameters
    ----------
    name : str
    address : str or None
        Ray cluster to join, unless this process has joined one; None takes the one that runs here.
    token : str or None
        The deployment's secret; None looks where `tokens.find_token` does, once an operation needs it.

    Raises
    ------
    OperatorError
        No cluster answers. Every method raises it too: no such deployment, no or a wrong token, or what was asked
        for cannot be.
    """

    def __init__(self, name: str = DEFAULT_NAME, address: str | None = None, token: str | None = None) -> None:
        self.name = name
        self._given = token
        if not ray.is_initialized():
            remote.connect_to(address)

    @overload
    def scale(self, workers: int, *, wait: bool = False, dry_run: Literal[False] = False) -> OperationStatus: ...
    @overload
    def scale(self, workers: int, *, wait: bool = False, dry_run: Literal[True]) -> Preview: ...

    def scale(self, workers: int, *, wait: bool = False, dry_run: bool = False) -> OperationStatus | Preview:
        """Go to so many workers, whatever their number is now; with ``dry_run`` only say what it would take.

        Asked again while it is under way, it returns the same operation.
        """
        if dry_run:
            seen: Preview = self._call("scale", workers, True)
            return seen
        return self._started(wait, "scale", workers)

    def rebalance(self, *, wait: bool = False) -> OperationStatus:
        """Move experts to where the measured loads want them, now."""
        return self._started(wait, "rebalance")

    def drain(self, device: str, deadline_s: float | None = None, *, wait: bool = False) -> OperationStatus:
        """Empty a device, or all devices of a node, and let its worker go. A node gets no new ones, until `undrain`.

        Its requests go on elsewhere and lose no token. KV cache that is not handed over after ``deadline_s`` seconds
        is given up, and computed again there; None lets the hand-over take its time.
        """
        return self._started(wait, "drain", device, deadline_s)

    def undrain(self, node: str) -> str:
        """Let a drained node take workers again; its id."""
        found: str = self._call("undrain", node)
        return found

    def cancel(self, operation: str) -> OperationStatus:
        """Withdraw an operation of which nothing has been committed; it leaves no trace."""
        status: OperationStatus = self._call("cancel", operation)
        return status

    def operation(self, operation: str, wait_s: float = 0.0, patience_s: float = remote.PATIENCE_S) -> OperationStatus:
        """How far an operation is; waits up to ``wait_s`` seconds for its end, and ``patience_s`` more for an answer.

        Raises
        ------
        InternalError
            There was none: the controller hangs, or has not started again.
        """
        status: OperationStatus = self._call("operation", operation, wait_s, patience_s=wait_s + patience_s)
        return status

    def operations(self) -> tuple[OperationStatus, ...]:
        """The latest operations, oldest first."""
        return self.status().operations

    def wait(self, operation: str, timeout_s: float = inf) -> OperationStatus:
        """How an operation ended, or how far it is after ``timeout_s`` seconds.

        A controller that is being restarted is waited for, too; raises as `operation` does.
        """
        end_s = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, end_s - time.monotonic())
            status = self.operation(operation, min(_POLL_S, left_s), patience_of(left_s))
            if status.state != "running" or time.monotonic() >= end_s:
                return status

    def status(self) -> DeploymentStatus:
        """A picture of the whole deployment."""
        return remote.deployment_status(self.name)

    def _started(self, wait: bool, method: str, *args: object) -> OperationStatus:
        status: OperationStatus = self._call(method, *args)
        return self.wait(status.id) if wait and status.state == "running" else status

    def _call(self, method: str, *args: object, patience_s: float = remote.PATIENCE_S) -> Any:
        """The controller's answer; where that does no harm, its restart is waited for, for ``patience_s`` in all."""
        remote_method = getattr(remote.find_controller(self.name), method).remote
        token = find_token(self.name, self._given)
        try:
            if method in _TWICE:
                return remote.ask_again(lambda: remote_method(token, *args), patience_s)
            return remote.ask(remote_method(token, *args))
        except WrongToken as e:
            raise WrongToken(f"{e}: {where_found(self.name, self._given)}") from None


def patience_of(left_s: float) -> float:
    """How long an answer is waited for where ``left_s`` seconds are left for more than that."""
    return min(remote.PATIENCE_S, max(_LEAST_PATIENCE_S, left_s))
