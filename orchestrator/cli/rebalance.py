"""``concertina rebalance``: experts to where the measured loads want them, now."""

from __future__ import annotations

import click

from .operation_run import Target, follow, target_options


@click.command("rebalance")
@target_options()
def command(target: Target) -> None:
    """Move experts to where the measured loads want them, without waiting for the next interval."""
    deployment = target.deployment()
    follow(target, deployment, lambda: deployment.rebalance())
