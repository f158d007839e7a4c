"""Entry point: finds the sub-command's module by name and imports only that one."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from ... import __version__
from ...errors import ConcertinaError

COMMANDS = {
    "serve": "Serve a checkpoint behind an OpenAI-compatible endpoint.",
    "status": "Show devices, pages by purpose, experts per worker and load.",
    "scale": "Scale to a number of workers, while requests stream.",
    "drain": "Empty a device or a node and let its workers go.",
    "undrain": "Let a drained node take workers again.",
    "rebalance": "Move experts to where the measured loads want them.",
    "cancel": "Withdraw an operation before it is committed.",
    "operations": "List what was asked for and what became of it.",
    "train": "Train a small byte-level MoE model and write it as a Hugging Face checkpoint.",
    "plan": "Plan where experts live, offline.",
}


class LazyGroup(click.Group):
    """Knows its commands' names and one-line helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f".{cmd_name}", __package__).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="concertina")
def cli() -> None:
    """Concertina: an elastic home for Mixture-of-Experts models on a Ray cluster."""


def main() -> None:
    """Run the command line; an expected error is one clear line and exit status 1."""
    try:
        cli()
    except ConcertinaError as e:
        click.echo(f"concertina: error: {e}", err=True)
        sys.exit(1)
