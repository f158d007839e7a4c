"""Which worker has probably cached which prompt prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

BLOCK = 64  # tokens


class PrefixMemory:
    """Remembers, for recently seen prefixes of whole blocks, the worker that computed them last.

    A guess only: the worker may have evicted them. The oldest are forgotten.

    Parameters
    ----------
    capacity : int
        Most blocks to remember.
    """

    def __init__(self, capacity: int = 65536) -> None:
        self._capacity = capacity
        self._workers: OrderedDict[int, str] = OrderedDict()

    def remember(self, tokens: Sequence[int], worker: str) -> None:
        for key in _chain(tokens):
            self._workers[key] = worker
            self._workers.move_to_end(key)
        while len(self._workers) > self._capacity:
            self._workers.popitem(last=False)

    def longest(self, tokens: Sequence[int]) -> dict[str, int]:
        """For each worker that has a prefix of ``tokens``, the length in tokens of the longest one."""
        found: dict[str, int] = {}
        for i, key in enumerate(_chain(tokens)):
            worker = self._workers.get(key)
            if worker is None:
                break
            found[worker] = (i + 1) * BLOCK
        return found


def _chain(tokens: Sequence[int]) -> Iterator[int]:
    key = 0
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = hash((key, *tokens[start : start + BLOCK]))
        yield key
