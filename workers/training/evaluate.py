"""Held-out text: the model's bits per byte beside what general compressors need for the same bytes."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from .data import Tokens
from .model import Decoder
from .tokens import EOS

_ROWS = 4
"""Windows per forward pass; more only leave the cache."""


def _ignore(done: int, total: int) -> None:
    return None


@torch.no_grad()
def held_out_bits(
    model: Decoder, tokens: Tokens, window: int, advance: Callable[[int, int], None] = _ignore
) -> tuple[float, list[Tensor]]:
    """Bits per byte of ``tokens`` and the routers' counts per layer and expert.

    The stream is cut into windows. Every token is predicted once, from those before it in its window and the one
    before that. The cost of the separators counts, their number does not: the compressors beside it see the same
    bytes without separators.

    Parameters
    ----------
    advance : callable
        Called with (tokens done, tokens in all).
    """
    stream = torch.from_numpy(np.concatenate([[EOS], tokens]).astype(np.int64))
    counts_LE = [torch.zeros(model.shape.experts, dtype=torch.int64) for _ in range(model.shape.layers)]
    nats = 0.0
    for start, end, rows in _pieces(len(tokens), window):
        inputs_BL, targets_BL = (stream[start + shift : end + shift].view(rows, -1) for shift in (0, 1))
        out = model(inputs_BL)
        nats += nn.functional.cross_entropy(out.logits_TV, targets_BL.reshape(-1), reduction="sum").item()
        for total_E, router in zip(counts_LE, out.routers, strict=True):
            total_E += router.counts_E
        advance(end, len(tokens))
    return nats / math.log(2) / int((tokens != EOS).sum()), counts_LE


def _pieces(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, windows) of batches of whole windows, and last of the rest, shorter than a window."""
    whole = length // window * window
    for start in range(0, whole, window * _ROWS):
        end = min(start + window * _ROWS, whole)
        yield start, end, (end - start) // window
    if whole < length:
        yield whole, length, 1


def gzip_bits(text: bytes) -> float:
    """Bits per byte of ``gzip -9``."""
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)


def xz_bits(text: bytes) -> float:
    """Bits per byte of ``xz -9e``."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
