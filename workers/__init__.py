"""What runs on devices: page owners, model families, expert exchange, engine and trainer.

Imports ``kernels`` and the nouns of ``planners``; never ``orchestrator``. ``import ray`` appears only
in ``workers/actors.py``.
"""
