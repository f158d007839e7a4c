"""``concertina operations``: what was asked of a deployment, and what became of it."""

from __future__ import annotations

import json

import click

from .operation_run import Target, target_options


@click.command("operations")
@target_options(waits=False)
def command(target: Target) -> None:
    """List the latest operations: scaling, draining and re-balancing."""
    found = target.deployment().operations()
    if target.as_json:
        click.echo(json.dumps([status.to_dict() for status in found], indent=2))
        return
    if not found:
        click.echo("no operation yet")
        return
    from rich.console import Console

    from .operation_view import operations_table

    Console().print(operations_table(found))
