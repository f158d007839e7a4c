"""``concertina undrain``: let a drained node take workers again."""

from __future__ import annotations

import json

import click

from .operation_run import Target, target_options


@click.command("undrain")
@click.argument("node")
@target_options(waits=False)
def command(target: Target, node: str) -> None:
    """Let NODE, which was drained, take workers again; the next scale may place some there."""
    found = target.deployment().undrain(node)
    click.echo(json.dumps({"node": found}) if target.as_json else f"node {found} takes workers again")
