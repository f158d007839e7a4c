"""llama.cpp through the C interface that llama-cpp-python exposes: all sequences in one batch. See `harness`.

``PYTHON run_llamacpp.py MODEL.gguf THREADS``.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from harness import NEW_TOKENS, PROMPT_TOKENS, Answers  # type: ignore[import-not-found]

MOST = 32  # sequences at once


class Llama:
    """A model, a context for `MOST` sequences and a batch to fill."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp  # type: ignore[import-not-found]
        import numpy

        self.c: Any = llama_cpp
        self.numpy: Any = numpy
        self.c.llama_backend_init()
        model = self.c.llama_model_load_from_file(path.encode(), self.c.llama_model_default_params())
        p = self.c.llama_context_default_params()
        p.n_ctx = MOST * (PROMPT_TOKENS + NEW_TOKENS)
        p.n_batch = MOST * PROMPT_TOKENS
        p.n_ubatch, p.n_seq_max, p.n_threads, p.n_threads_batch = 512, MOST, threads, threads
        p.kv_unified = True
        self.context = self.c.llama_init_from_model(model, p)
        if not model or not self.context:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.vocab = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(model))
        self.batch = self.c.llama_batch_init(MOST * PROMPT_TOKENS, 0, 1)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Run (token, position, sequence, wants logits) rows."""
        b = self.batch
        for i, (token, position, sequence, wanted) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, wanted
            b.seq_id[i][0] = sequence
        b.n_tokens = len(rows)
        if self.c.llama_decode(self.context, b) != 0:
            raise SystemExit("llama_decode failed")

    def best(self, row: int) -> int:
        """The most likely token of a row whose logits were wanted."""
        logits = self.c.llama_get_logits_ith(self.context, row)
        return int(self.numpy.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def generate(self, prompts: list[list[int]]) -> list[list[float]]:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        last = PROMPT_TOKENS - 1
        self.decode([(t, i, s, i == last) for s, prompt in enumerate(prompts) for i, t in enumerate(prompt)])
        tokens = [self.best(s * PROMPT_TOKENS + last) for s in range(len(prompts))]
        times_s = [time.perf_counter()]
        for step in range(NEW_TOKENS - 1):
            self.decode([(t, PROMPT_TOKENS + step, s, True) for s, t in enumerate(tokens)])
            tokens = [self.best(s) for s in range(len(prompts))]
            times_s.append(time.perf_counter())
        return [times_s] * len(prompts)


def main() -> None:
    answers = Answers()
    answers.serve(Llama(sys.argv[1], int(sys.argv[2])).generate)


if __name__ == "__main__":
    main()
