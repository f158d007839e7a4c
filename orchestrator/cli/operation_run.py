"""What the commands that change a deployment have in common: options, waiting, the last line, the exit status."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import click

from ...errors import OperatorError
from ..config import DEFAULT_NAME, parse_seconds
from ..tokens import VARIABLE

if TYPE_CHECKING:  # importing Ray takes a second, which --help does not need
    from ..api import Deployment
    from ..status import OperationStatus


class SecondsType(click.ParamType[float]):
    """A duration with an optional unit."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_seconds(str(value))
        except OperatorError as e:
            self.fail(str(e), param, ctx)


@dataclass(frozen=True)
class Target:
    """Which deployment, and how to talk about it.

    ``wait`` None waits on a terminal, or where there is a ``timeout_s``, only; ``timeout_s`` None waits for ever.
    """

    name: str
    address: str | None
    token: str | None
    as_json: bool = False
    wait: bool | None = None
    timeout_s: float | None = None

    @property
    def named(self) -> str:
        """What a command must be given so that it is about the same deployment."""
        name = "" if self.name == DEFAULT_NAME else f" --name {self.name}"
        return name if self.address is None else f"{name} --address {self.address}"

    def deployment(self) -> Deployment:
        from ..api import Deployment

        return Deployment(self.name, self.address, self.token)


_TARGET_OPTIONS = (
    click.option("--name", default=DEFAULT_NAME, show_default=True, help="Name of the deployment."),
    click.option("--address", help="Ray cluster.  [default: the one that runs here]"),
    click.option("--token", help=f"The deployment's token.  [default: ${VARIABLE}, or what serve wrote here]"),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
)
_WAIT_OPTIONS = (
    click.option("--wait/--no-wait", default=None, help="Wait for the end.  [default: wait on a terminal]"),
    click.option("--timeout", "timeout_s", type=SecondsType(), help="Wait, so long at most, e.g. 90s."),
)


def target_options(waits: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that fill a `Target`, which the command gets as its first argument."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        names = [f.name for f in fields(Target)] if waits else ["name", "address", "token", "as_json"]

        @functools.wraps(command)
        def filled(**options: Any) -> Any:
            target = Target(**{name: options.pop(name) for name in names})
            if target.wait is False and target.timeout_s is not None:
                raise click.UsageError("--timeout waits; expected one of --no-wait and --timeout")
            return command(target, **options)

        wrapped: Callable[..., Any] = filled
        for option in reversed(_TARGET_OPTIONS + (_WAIT_OPTIONS if waits else ())):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def follow(target: Target, deployment: Deployment, begin: Callable[[], OperationStatus]) -> None:
    """Begin an operation, show it until it ends, if that was asked for, and say what became of it.

    Raises
    ------
    OperatorError
        It failed, was canceled or superseded, or did not end in time.
    """
    try:
        status = begin()
    except KeyboardInterrupt:
        click.echo(f"\nit may have been accepted; concertina operations{target.named} shows it", err=True)
        sys.exit(130)
    waits = target.wait if target.wait is not None else target.timeout_s is not None or sys.stdout.isatty()
    if waits and status.state == "running":
        status = _watched(target, deployment, status)
    if target.as_json:
        click.echo(json.dumps(status.to_dict(), indent=2))
    tell(target, status, waited=waits)


def _watched(target: Target, deployment: Deployment, status: OperationStatus) -> OperationStatus:
    from ..remote import Unavailable
    from .operation_view import watch

    try:
        return watch(deployment, status, target.timeout_s)
    except KeyboardInterrupt:
        command = f"concertina cancel {status.id}{target.named}"
        click.echo(f"\noperation {status.id} goes on; until it is committed, {command} withdraws it", err=True)
        sys.exit(130)
    except Unavailable as e:
        raise Unavailable(f"{e}; operation {status.id} goes on: concertina operations{target.named}") from e


def tell(target: Target, status: OperationStatus, waited: bool) -> None:
    """The last line; a bad end is an error."""
    from .operation_view import outcome

    if status.state == "running" and waited:
        raise OperatorError(f"{outcome(status)}; concertina operations{target.named} shows how it goes on")
    if status.state in ("failed", "canceled", "superseded"):
        raise OperatorError(outcome(status))
    if not target.as_json:
        click.echo(outcome(status))
