"""Which device has probably cached which prompt prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

BLOCK = 64  # tokens


@dataclass(slots=True)
class _Cache:
    """What a device computes until it leaves; ``heir`` has it then, or nobody. One that comes again begins another."""

    device: str
    heir: _Cache | None = None
    lost: bool = False


class PrefixMemory:
    """Remembers, for recently seen prefixes of whole blocks, the device whose worker computed them last.

    A guess only: they may have been evicted. The oldest are forgotten.

    Parameters
    ----------
    capacity : int
        Most blocks to remember.
    """

    def __init__(self, capacity: int = 65536) -> None:
        self._capacity = capacity
        self._found: OrderedDict[int, _Cache] = OrderedDict()
        self._caches: dict[str, _Cache] = {}

    def remember(self, tokens: Sequence[int], device: str) -> None:
        cache = self._cache(device)
        for key in _chain(tokens):
            self._found[key] = cache
            self._found.move_to_end(key)
        while len(self._found) > self._capacity:
            self._found.popitem(last=False)

    def inherit(self, device: str, heir: str) -> None:
        """What ``device`` had, ``heir`` has from now on."""
        if device != heir and (left := self._caches.pop(device, None)):
            left.heir = self._cache(heir)

    def forget_others(self, devices: Set[str]) -> None:
        """Nobody has what devices other than these had."""
        for device in self._caches.keys() - devices:
            self._caches.pop(device).lost = True

    def longest(self, tokens: Sequence[int]) -> dict[str, int]:
        """For each device that has a prefix of ``tokens``, the length in tokens of the longest one."""
        found: dict[str, int] = {}
        for i, key in enumerate(_chain(tokens)):
            cache = self._found.get(key)
            if cache is None:
                break
            while cache.heir is not None:
                cache = self._found[key] = cache.heir
            if cache.lost:
                break
            found[cache.device] = (i + 1) * BLOCK
        return found

    def _cache(self, device: str) -> _Cache:
        return self._caches.setdefault(device, _Cache(device))


def _chain(tokens: Sequence[int]) -> Iterator[int]:
    key = 0
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = hash((key, *tokens[start : start + BLOCK]))
        yield key
