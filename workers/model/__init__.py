"""One decoder for every family, over paged KV and an `Experts` seam.

Knows tensors, never processes, pages' owners, placement or Ray.
"""
