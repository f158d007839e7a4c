"""Physical pages, who owns them, and how they are mapped.

Nothing here imports torch, except `views`, which turns mapped pages into tensors.
"""
