"""Token ids to text, a token at a time: incremental detokenisation and stop strings.

What comes out never depends on how tokens were grouped on the way, and never contains half a character (I1, I2).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4  # bytes of UTF-8, so that many byte tokens at most belong to one character


class Detokenizer(Protocol):
    """Turns one sequence's tokens into text."""

    def push(self, token_id: int) -> str:
        """Text that became certain with this token, perhaps empty."""

    def flush(self) -> str:
        """The rest, with U+FFFD for a character that stayed incomplete."""


class ByteDetokenizer:
    """For vocabularies in which every token is a fixed string of bytes (byte-level BPE): exact, and constant time.

    Parameters
    ----------
    token_bytes : callable
        Bytes of a token id; empty for special tokens.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any other tokenizer: decode a small window with and without the new tokens, and emit the difference.

    The window is the last group of tokens that ended on a whole character, as context (a first token may lose its
    leading space, and a word piece joins what precedes it), and the tokens whose text is not certain yet.

    Parameters
    ----------
    decode : callable
        Token ids to text.
    context : sequence of int
        The prompt's last tokens, so that a completion begins with the space that separates it from the prompt.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._pending: list[int] = []
        self._set_context(list(context))

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        piece = self._piece()
        if piece.endswith(REPLACEMENT) and len(self._pending) < LONGEST_CHARACTER:
            return ""
        return self._emit(piece)

    def flush(self) -> str:
        return self._emit(self._piece()) if self._pending else ""

    def _piece(self) -> str:
        text = self._decode(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(self._pending)  # the new bytes made the decoder read those before them differently

    def _emit(self, piece: str) -> str:
        # Invalid bytes as context would spoil the valid ones after them; no text would be no context.
        if piece and REPLACEMENT not in piece:
            self._set_context(self._pending)
        self._pending = []
        return piece

    def _set_context(self, context: list[int]) -> None:
        self._context = context
        self._context_text = self._decode(context) if context else ""


class StopMatcher:
    """Passes text on up to the first stop string, holding back what may turn out to be the start of one.

    The first stop string is the one that is complete first; of several that end at the same character, the longest.

    Parameters
    ----------
    stops : sequence of str
        Non-empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is certain not to belong to a stop string. After a match nothing comes any more."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        buffer, self._held = self._held + text, ""
        certain = self._find(buffer)
        if self.matched is None:
            certain = len(buffer) - max(_overlap(buffer, stop) for stop in self._stops)
            self._held = buffer[certain:]
        return buffer[:certain]

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held

    def _find(self, buffer: str) -> int:
        """Where the first complete stop string begins; sets ``matched`` if there is one."""
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if not found:
            return len(buffer)
        _, start, self.matched = min(found)
        return start


def _overlap(buffer: str, stop: str) -> int:
    """Length of the longest suffix of ``buffer`` that begins ``stop``."""
    for length in range(min(len(stop) - 1, len(buffer)), 0, -1):
        if buffer.endswith(stop[:length]):
            return length
    return 0
