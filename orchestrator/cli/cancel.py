"""``concertina cancel``: withdraw an operation before it is committed."""

from __future__ import annotations

import json

import click

from ...errors import OperatorError
from .operation_run import Target, target_options


@click.command("cancel")
@click.argument("operation")
@target_options(waits=False)
def command(target: Target, operation: str) -> None:
    """Withdraw OPERATION. Until its first commit this undoes all of it; afterwards it is refused."""
    from .operation_view import outcome

    status = target.deployment().cancel(operation)
    if target.as_json:
        click.echo(json.dumps(status.to_dict(), indent=2))
    if status.state in ("done", "failed"):
        raise OperatorError(f"too late: {outcome(status)}")
    if not target.as_json:
        click.echo(outcome(status))
