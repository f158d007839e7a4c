"""The ``concertina`` command. Each sub-command is one module, imported only when it is called."""
