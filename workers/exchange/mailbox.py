"""One direction between two members: messages of any length through two slots of shared memory.

``sent`` counts chunks written (source's word), ``taken`` chunks read (destination's). The source may be at most two
ahead, so a member that is one message behind never blocks a small one. Counters wrap at 2^32, which only
ever compares differences of at most 2.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from . import futex
from .layout import LINE, SLOTS, Layout

_MASK = 0xFFFFFFFF

memmove = ctypes.CDLL(None).memmove
memmove.restype = None
memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True, slots=True)
class Head:
    """What the first chunk of a message says: kind of call, rows, bytes of a row."""

    kind: int
    rows: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


class _Pair:
    def __init__(self, layout: Layout, origin: int, source: int, destination: int) -> None:
        sent = origin + layout.sent(source, destination)
        self._sent = ctypes.c_uint32.from_address(sent)
        self._wants = ctypes.c_uint32.from_address(sent + 4)
        self._taken = ctypes.c_uint32.from_address(origin + layout.taken(source, destination))
        slots = [origin + layout.slot(source, destination, i) for i in range(SLOTS)]
        self._heads = [(ctypes.c_int64 * 3).from_address(a) for a in slots]
        self._payloads = [a + LINE for a in slots]
        self._capacity = layout.capacity
        self._count = 0
        self._left = 0
        self._address = 0


class Outbox(_Pair):
    """The source's side."""

    def __init__(self, layout: Layout, origin: int, source: int, destination: int) -> None:
        super().__init__(layout, origin, source, destination)
        self._bell = origin + layout.bell(destination)
        self._head: Head | None = None

    @property
    def open(self) -> bool:
        """Whether part of the message has not been written yet."""
        return self._head is not None or self._left > 0

    def start(self, head: Head, address: int) -> None:
        """Begin a message whose bytes lie at ``address`` until it is no longer `open`."""
        self._head, self._address, self._left = head, address, head.nbytes

    def push(self) -> bool:
        """Write what the slots take; False when nothing could be written."""
        before = self._count
        while self.open and (self._count - self._taken.value) & _MASK < SLOTS:
            self._write()
        # The destination rings our bell for a freed slot only if asked. Whoever sleeps on that bell has read it
        # and called `push` again after asking; should the store still be under way then, the sleep's slice ends it.
        self._wants.value = self.open
        if self._count == before:
            return False
        futex.add_and_wake(self._bell)
        return True

    def _write(self) -> None:
        slot = self._count % SLOTS
        if self._head is not None:
            fields = self._heads[slot]
            fields[0], fields[1], fields[2] = self._head.kind, self._head.rows, self._head.row_bytes
            self._head = None
        n = min(self._left, self._capacity)
        if n:
            memmove(self._payloads[slot], self._address, n)
        self._address += n
        self._left -= n
        self._count = (self._count + 1) & _MASK
        self._sent.value = self._count


class Inbox(_Pair):
    """The destination's side."""

    def __init__(self, layout: Layout, origin: int, source: int, destination: int) -> None:
        super().__init__(layout, origin, source, destination)
        self._source_bell = origin + layout.bell(source)
        self._fresh = False

    def peek(self) -> Head | None:
        """The head of the next message, if its first chunk is here."""
        if self._sent.value == self._count:
            return None
        fields = self._heads[self._count % SLOTS]
        return Head(fields[0], fields[1], fields[2])

    def accept(self, head: Head, address: int) -> None:
        """Let the peeked message's bytes go to ``address``; call `pull` until it says that all are there."""
        self._address, self._left, self._fresh = address, head.nbytes, True

    @property
    def open(self) -> bool:
        """Whether part of the accepted message is missing."""
        return self._fresh or self._left > 0

    def pull(self) -> bool:
        """Read the chunks that are here; False when there were none."""
        before = self._count
        while self.open and self._sent.value != self._count:
            self._read()
        if self._count == before:
            return False
        if self._wants.value:
            futex.add_and_wake(self._source_bell)
        return True

    def _read(self) -> None:
        n = min(self._left, self._capacity)
        if n:
            memmove(self._address, self._payloads[self._count % SLOTS], n)
        self._fresh = False
        self._address += n
        self._left -= n
        self._count = (self._count + 1) & _MASK
        self._taken.value = self._count
