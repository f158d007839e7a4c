"""What is known about a device's KV pages, kept beside them in shared memory so that it outlives the worker.

Never here: torch, the KV itself, or any decision about which block is used next.
"""
