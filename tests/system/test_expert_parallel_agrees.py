"""The outside judge again, now through the controller, several worker processes, their exchange and their engines."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from concertina.orchestrator.config import EngineOptions
from concertina.planners.placement import Placement, Replica
from concertina.workers.model_files import ModelFiles
from concertina.workers.protocol import EngineOutput, EngineRequest, SamplingParams
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..checkpoints import FAMILIES, VOCAB, make_checkpoint
from .crew import Deployment, Member, deployed

pytestmark = pytest.mark.ray

TOLERANCE = 1e-4  # of the logits' range
TOKENS = 64
# A router that scores its last chosen and its first unchosen expert nearer than rounding picks either, and both are
# right: seen at a gap of 6e-7, where one token's log-probabilities differed by 2% of the range with one worker too.
LEAST_GAP = 1e-5
LENGTHS = (1, 17, 63, 140, 500)
BLOCK_TOKENS = 16
# Counts that neither 2 nor 3 divides.
EXPERTS: dict[str, dict[str, int]] = {
    "mixtral": {"num_local_experts": 5},
    "olmoe": {"num_experts": 7},
    "qwen3_moe": {"num_experts": 7},
    "deepseek_v3": {"n_routed_experts": 25, "n_group": 5, "topk_group": 3},
}


@dataclass(frozen=True)
class Case:
    """How a model is spread. ``weights`` says how often each worker holds an expert; None is the default placement."""

    exchange: str
    workers: int
    weights: tuple[float, ...] | None = None
    replicas: int = 1
    chunked: bool = True
    busy: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        spread = "default" if self.weights is None else "-".join(f"{w:g}" for w in self.weights)
        return f"{self.workers}-{self.exchange}-{spread}-x{self.replicas}-{'chunked' if self.chunked else 'whole'}"


CASES = [
    Case("auto", 1),
    Case("auto", 1, chunked=False),
    Case("shared", 2, busy=(0, 1)),
    Case("shared", 2, (0, 1), chunked=False, busy=(0,)),
    Case("gloo", 2, (5, 1), replicas=2, busy=(1,)),
    Case("shared", 3, (3, 1, 0), busy=(0, 2)),
    Case("shared", 3, (1, 1, 1), replicas=3, chunked=False, busy=(1,)),
    Case("gloo", 3, (2, 0, 1), replicas=2, chunked=False, busy=(1, 2)),
    Case("gloo", 3, busy=(0, 1, 2)),
]


@dataclass(frozen=True)
class Truth:
    """What transformers says: greedy tokens, and the log-probabilities and range of logits they were chosen by."""

    tokens: list[int]
    logprobs_NV: Tensor
    span: float


class Judge:
    """A checkpoint and transformers' opinion of it, each prompt asked once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model = open_judge(path, torch.float32)
        self._known: dict[tuple[int, ...], Truth] = {}
        self._routed: dict[str, Tensor] = {}
        for name, module in self._model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(partial(self._note, name))

    def _note(self, name: str, gate: torch.nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        x_TH = inputs[0].reshape(-1, inputs[0].shape[-1])
        self._routed[name] = x_TH @ gate.weight.T

    def _gap(self) -> float:
        """Least distance, in the last forward pass, between the logits of a router's last chosen and next expert.

        DeepSeek-V3's choice among groups is not a plain top-k of these scores; for it this is an indication only.
        """
        k = self._model.config.num_experts_per_tok
        best = [scores_TE.topk(k + 1).values for scores_TE in self._routed.values()]
        return min(float((top[:, k - 1] - top[:, k]).min()) for top in best)

    @torch.inference_mode()
    def truth(self, prompt: tuple[int, ...]) -> Truth:
        if prompt not in self._known:
            ids = torch.tensor([prompt])
            tokens = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS
            )[0, len(prompt) :].tolist()
            logits_NV = logits_of(self._model, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
            span = float(logits_NV.max() - logits_NV.min())
            assert self._gap() > LEAST_GAP, "a router nearly ties: neither choice would be wrong; take another prompt"
            self._known[prompt] = Truth(tokens, logits_NV.log_softmax(-1), span)
        return self._known[prompt]


def open_judge(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    judge = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    judge.generation_config.eos_token_id = None  # so that it goes on as long as it is asked to
    return judge


@torch.inference_mode()
def logits_of(judge: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    return judge(torch.tensor([list(tokens)])).logits[0].float()


@pytest.fixture(scope="module")
def members() -> Iterator[list[Member]]:
    torch.set_num_threads(1)
    members = [Member() for _ in range(3)]
    yield members
    for member in members:
        member.end()


@pytest.fixture(scope="module")
def judge_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Judge]:
    made: dict[str, Judge] = {}

    def get(family: str) -> Judge:
        if family not in made:
            path = make_checkpoint(family, tmp_path_factory.mktemp(family), **EXPERTS[family])
            made[family] = Judge(path)
        return made[family]

    return get


def make_prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(4, VOCAB, (length,), generator=generator).tolist())


def spread(case: Case, path: Path, order: random.Random) -> Placement:
    """A placement by the case's weights; an expert's replicas get unequal shares."""
    assert case.weights is not None
    model = ModelFiles.open(str(path)).config
    holders = [d for d, weight in enumerate(case.weights) if weight]
    layers = []
    for _ in model.moe_layers:
        slots: Counter[int] = Counter()
        experts = []
        for expert in range(model.experts):
            want = min(case.replicas if expert % 2 == 0 else 1, len(holders))
            on = list(holders)
            while len(on) > want:
                on.remove(order.choices(on, [1 / case.weights[d] for d in on])[0])
            shares = [(i + 1) / (len(on) * (len(on) + 1) / 2) for i in range(len(on))]
            experts.append(tuple(Replica(d, slots[d], share) for d, share in zip(on, shares, strict=True)))
            slots.update(on)
        layers.append(tuple(experts))
    return Placement(tuple(f"cpu-{d}" for d in range(case.workers)), tuple(layers))


def fields_of(case: Case, judge: Judge, directory: Path) -> dict[str, Any]:
    placement_file = None
    if case.weights is not None:
        placement_file = str(directory / "placement.json")
        Path(placement_file).write_text(json.dumps(spread(case, judge.path, random.Random(3)).to_dict()))
    engine = EngineOptions(max_batched_tokens=48, chunked_prefill=case.chunked, max_running=8, threads=1)
    return {
        "workers": case.workers,
        "exchange": case.exchange,
        "placement_file": placement_file,
        "rebalance_s": 0.0,
        "engine": engine,
    }


async def generate(deployment: Deployment, rank: int, prompt: tuple[int, ...], tokens: int) -> EngineOutput:
    """Greedy tokens with the log-probabilities of the whole vocabulary, outputs joined into one."""
    sampling = SamplingParams(tokens, temperature=0, ignore_eos=True, logprobs=VOCAB)
    outputs = [o async for o in deployment.clients[rank].submit(EngineRequest("r", prompt, sampling))]
    assert outputs[-1].finish_reason == "length"
    ids = tuple(token for o in outputs for token in o.token_ids)
    logprobs = tuple(p for o in outputs for p in o.logprobs)
    return EngineOutput("r", ids, "length", logprobs, max(o.cached_tokens for o in outputs))


def logprobs_of(output: EngineOutput) -> Tensor:
    found_NV = torch.full((len(output.logprobs), VOCAB), float("nan"))
    for row_V, logprob in zip(found_NV, output.logprobs, strict=True):
        ids, values = zip(*logprob.top, strict=True)
        row_V[list(ids)] = torch.tensor(values)
    return found_NV


def assert_agrees(output: EngineOutput, true: Truth) -> None:
    count = len(output.token_ids)
    assert list(output.token_ids) == true.tokens[:count]
    error = float((logprobs_of(output) - true.logprobs_NV[:count]).abs().max())
    assert error <= TOLERANCE * true.span


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logits_are_those_of_transformers(
    members: list[Member], judge_of: Callable[[str], Judge], tmp_path: Path, family: str, case: Case
) -> None:
    """All prompts at once on the busy workers, then again with their prefixes cached."""
    judge = judge_of(family)
    work = [(case.busy[i % len(case.busy)], make_prompt(length, seed=6)) for i, length in enumerate(LENGTHS)]

    async def go() -> tuple[list[EngineOutput], list[EngineOutput]]:
        async with deployed(members, judge.path, **fields_of(case, judge, tmp_path)) as deployment:
            missed = await asyncio.gather(*(generate(deployment, rank, p, TOKENS) for rank, p in work))
            hit = await asyncio.gather(*(generate(deployment, rank, p, 8) for rank, p in work))
            deployment.controller.check()
        return missed, hit

    missed, hit = asyncio.run(go())
    for (_, prompt), first, second in zip(work, missed, hit, strict=True):
        true = judge.truth(prompt)
        assert len(set(true.tokens)) > 8, "the checkpoint repeats itself: this would show nothing"
        assert len(first.token_ids) == TOKENS
        assert_agrees(first, true)
        assert_agrees(second, true)
        assert first.cached_tokens == 0
        # The last prompt token is always computed, for its logits.
        assert second.cached_tokens == (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_as_near_to_the_truth_as_transformers(
    members: list[Member], judge_of: Callable[[str], Judge], tmp_path: Path, family: str, dtype: str
) -> None:
    judge, prompts = judge_of(family), [make_prompt(length, seed=5) for length in (40, 41, 90)]
    case = Case("shared", 2, (2, 1), replicas=2)

    async def go() -> list[EngineOutput]:
        fields = {**fields_of(case, judge, tmp_path), "dtype": dtype}
        async with deployed(members, judge.path, **fields) as deployment:
            return await asyncio.gather(*(generate(deployment, i % 2, p, 1) for i, p in enumerate(prompts)))

    half = open_judge(judge.path, getattr(torch, dtype))
    ours, theirs = 0.0, 0.0
    for prompt, output in zip(prompts, asyncio.run(go()), strict=True):
        true = judge.truth(prompt)
        ours += float((logprobs_of(output) - true.logprobs_NV[:1]).abs().mean()) / true.span
        theirs += float((logits_of(half, prompt)[-1:].log_softmax(-1) - true.logprobs_NV[:1]).abs().mean()) / true.span
    assert ours < max(1.5 * theirs, 3e-3)
