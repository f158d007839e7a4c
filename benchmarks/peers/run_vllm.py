"""vLLM's CPU build, driven step by step in this process. See `harness`."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from harness import NEW_TOKENS, Answers  # type: ignore[import-not-found]


def main() -> None:
    answers = Answers()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    llm: Any = LLM(
        model=sys.argv[1],
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=64,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    count = 0

    def generate(prompts: list[list[int]]) -> list[list[float]]:
        nonlocal count
        times_s: dict[str, list[float]] = {}
        for prompt in prompts:
            count += 1
            times_s[str(count)] = []
            llm.llm_engine.add_request(str(count), {"prompt_token_ids": prompt}, sampling)
        while llm.llm_engine.has_unfinished_requests():
            outputs = llm.llm_engine.step()
            now_s = time.perf_counter()
            for output in outputs:
                seen = times_s[output.request_id]
                seen.extend([now_s] * len(output.outputs[0].token_ids))
        return list(times_s.values())

    answers.serve(generate)


if __name__ == "__main__":
    main()
