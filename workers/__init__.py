"""What runs on devices: page owners, model families, expert exchange, engine and trainer.

Imports ``kernels`` and the nouns of ``planners``; never ``orchestrator``, and never Ray, which makes actors of the
classes in ``services``.
"""
