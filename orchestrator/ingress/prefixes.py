"""Which device has probably cached which prompt prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

BLOCK = 64  # tokens


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
        self._devices: OrderedDict[int, str] = OrderedDict()
        self._heirs: dict[str, str] = {}

    def remember(self, tokens: Sequence[int], device: str) -> None:
        self._heirs.pop(device, None)
        for key in _chain(tokens):
            self._devices[key] = device
            self._devices.move_to_end(key)
        while len(self._devices) > self._capacity:
            self._devices.popitem(last=False)

    def inherit(self, device: str, heir: str) -> None:
        """What ``device`` had, ``heir`` has from now on."""
        self._heirs.pop(heir, None)  # hence no circles
        if device != heir:
            self._heirs[device] = heir

    def longest(self, tokens: Sequence[int]) -> dict[str, int]:
        """For each device that has a prefix of ``tokens``, the length in tokens of the longest one."""
        found: dict[str, int] = {}
        for i, key in enumerate(_chain(tokens)):
            device = self._devices.get(key)
            if device is None:
                break
            found[self._now_at(device)] = (i + 1) * BLOCK
        return found

    def _now_at(self, device: str) -> str:
        while device in self._heirs:
            device = self._heirs[device]
        return device


def _chain(tokens: Sequence[int]) -> Iterator[int]:
    key = 0
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = hash((key, *tokens[start : start + BLOCK]))
        yield key
