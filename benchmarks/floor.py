"""What one generation would take if weights and arithmetic ran at the machine's measured rates.

A forward pass takes the longer of two times: its activated weights and KV over the rate at which that many bytes are
read again and again (so a small model is read at its cache's rate), its floating-point operations over the rate of
bfloat16 products. Experts are counted as if every token chose independently and evenly. Where tokens repeat, fewer
experts are read and nearer caches hold them: then an engine can be faster than this, so it is an estimate, not a bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from concertina.workers.families.base import GqaAttention, ModelConfig
from concertina.workers.model_files import ModelFiles

from .peers.harness import NEW_TOKENS, PROMPT_TOKENS

_MATRIX = 1024
_BEST_OF = 12


@dataclass(frozen=True)
class Machine:
    """What ``threads`` threads reach: bytes read a second from as many bytes, and bfloat16 operations a second."""

    threads: int
    bytes_per_s: float
    flops_per_s: float


def measure(threads: int, nbytes: int) -> Machine:
    """Best of a few runs of a sum over ``nbytes`` and of a 1024 x 1024 x 1024 product."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.zeros(nbytes // 4)
        a = torch.ones(_MATRIX, _MATRIX, dtype=torch.bfloat16)
        read_s, product_s = _best_s(lambda: data.sum()), _best_s(lambda: a @ a)
    finally:
        torch.set_num_threads(before)
    return Machine(threads, nbytes / read_s, 2 * _MATRIX**3 / product_s)


def _best_s(run: Callable[[], object]) -> float:
    times_s = []
    for _ in range(_BEST_OF):
        began_s = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - began_s)
    return min(times_s)


@dataclass(frozen=True)
class Model:
    """Bytes and weights of the benchmark's checkpoint (no dense MLPs, its own output head)."""

    config: ModelConfig
    dense_bytes: int
    expert_bytes: int
    kv_token_bytes: int

    @classmethod
    def of(cls, files: ModelFiles) -> Model:
        c = files.config
        assert isinstance(c.attention, GqaAttention)
        embedding = c.vocab_size * c.hidden_size * 2  # of which a token reads one row
        return cls(c, files.trunk_bytes - embedding, files.expert_bytes, files.kv_block_bytes(1))

    def tokens_per_s(self, machine: Machine, concurrency: int) -> float:
        """New tokens a second, the prompts' pass included."""
        steps = [self._pass_s(machine, concurrency, PROMPT_TOKENS, 0)]
        steps += [self._pass_s(machine, concurrency, 1, PROMPT_TOKENS + i) for i in range(1, NEW_TOKENS)]
        return concurrency * NEW_TOKENS / sum(steps)

    def weight_bytes(self, tokens: int) -> float:
        """Weights that a pass with so many tokens reads."""
        c = self.config
        active = c.experts * (1 - (1 - c.top_k / c.experts) ** tokens)
        return self.dense_bytes + len(c.moe_layers) * active * self.expert_bytes

    def _pass_s(self, machine: Machine, concurrency: int, new: int, context: int) -> float:
        c, tokens = self.config, concurrency * new
        nbytes = self.weight_bytes(tokens) + concurrency * context * self.kv_token_bytes
        # 2 bytes a weight, 2 operations a weight and token
        flops = tokens * (self.dense_bytes + len(c.moe_layers) * c.top_k * self.expert_bytes)
        return max(nbytes / machine.bytes_per_s, flops / machine.flops_per_s)
