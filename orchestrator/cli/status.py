"""``concertina status``: what runs, where experts live and how busy everything is."""

from __future__ import annotations

import contextlib
import json
import time

import click
from rich.console import Console
from rich.live import Live

from ..config import DEFAULT_NAME
from .status_view import StatusView


@click.command("status")
@click.option("--name", default=DEFAULT_NAME, show_default=True, help="Name of the deployment.")
@click.option("--address", help="Ray cluster.  [default: the one that runs here]")
@click.option("--json", "as_json", is_flag=True, help="Print one snapshot as JSON.")
@click.option("--watch/--once", default=None, help="Keep the table live.  [default: live on a terminal]")
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds.")
def command(name: str, address: str | None, as_json: bool, watch: bool | None, interval: float) -> None:
    """Show devices, pages by purpose, experts per worker and load."""
    from ..remote import connect_to, deployment_status

    connect_to(address)
    if as_json:
        click.echo(json.dumps(deployment_status(name).to_dict(), indent=2))
        return
    console = Console()
    view = StatusView()
    if not (console.is_terminal if watch is None else watch):
        console.print(view.render(deployment_status(name), time.monotonic()))
        return
    # Ctrl-C is how it is left
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, refresh_per_second=4) as live:
        while True:
            live.update(view.render(deployment_status(name), time.monotonic()))
            time.sleep(interval)
