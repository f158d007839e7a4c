"""Token ids of the byte-level vocabulary: a byte is its own id, specials follow."""

from __future__ import annotations

EOS, PAD = 256, 257
SPECIALS = {"<|endoftext|>": EOS, "<|pad|>": PAD}
VOCAB = 256 + len(SPECIALS)
