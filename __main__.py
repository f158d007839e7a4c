"""``python -m concertina`` is the ``concertina`` command."""

from .orchestrator.cli.main import main

main()
