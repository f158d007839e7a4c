"""``concertina scale``: more or fewer workers, while requests stream."""

from __future__ import annotations

import json
from typing import Any

import click

from .operation_run import Target, follow, target_options


@click.command("scale")
@click.option("--workers", type=click.IntRange(min=1), required=True, help="Workers there shall be.")
@click.option("--dry-run", is_flag=True, help="Only show what it would take.")
@target_options()
def command(target: Target, workers: int, dry_run: bool) -> None:
    """Scale the deployment to so many workers. Requests go on; the same command again joins what is under way."""
    deployment = target.deployment()
    if not dry_run:
        follow(target, deployment, lambda: deployment.scale(workers))
        return
    preview: Any = deployment.scale(workers, dry_run=True)
    if target.as_json:
        click.echo(json.dumps(preview.to_dict(), indent=2))
        return
    from rich.console import Console

    from .preview_view import render

    Console().print(render(preview))
