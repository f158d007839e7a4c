"""``concertina drain``: empty a device or a node and let its workers go."""

from __future__ import annotations

import click

from .operation_run import SecondsType, Target, follow, target_options


@click.command("drain")
@click.argument("device")
@click.option("--deadline", "deadline_s", type=SecondsType(), help="Most time to hand its KV cache over, e.g. 60s.")
@target_options()
def command(target: Target, device: str, deadline_s: float | None) -> None:
    """Empty DEVICE (such as cpu-1), or all devices of a node, and let its worker go.

    Its requests go on elsewhere and lose no token. What is not handed over by the deadline is computed again there.
    A node gets no workers any more, until concertina undrain.
    """
    deployment = target.deployment()
    follow(target, deployment, lambda: deployment.drain(device, deadline_s))
