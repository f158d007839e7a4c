"""transformers' ``generate`` on one batch, experts by grouped matrix products. See `harness`."""

from __future__ import annotations

import sys
import time
from typing import Any

from harness import NEW_TOKENS, Answers  # type: ignore[import-not-found]


def main() -> None:
    answers = Answers()
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    class Watch(StoppingCriteria):
        """Ends nothing; notes when each step's tokens are there."""

        def __init__(self) -> None:
            self.times_s: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.times_s.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    torch.set_num_threads(int(sys.argv[2]))
    model: Any = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype=torch.bfloat16, experts_implementation="grouped_mm"
    )
    model.eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]]) -> list[list[float]]:
        ids, watch = torch.tensor(prompts), Watch()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=2,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        return [watch.times_s] * len(prompts)

    answers.serve(generate)


if __name__ == "__main__":
    main()
