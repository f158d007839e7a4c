"""The engine on the real decoder, KV cache and exchanges instead of the fakes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from concertina.workers.engine.core import EngineConfig
from concertina.workers.engine.engine import Engine
from concertina.workers.engine.scheduler import SchedulerConfig
from concertina.workers.exchange.solo import SoloExchange
from concertina.workers.model.batch import Batch
from concertina.workers.model.kv import KVCache
from torch import Tensor

from ..checkpoints import VOCAB, make_checkpoint
from ..exchange.crew import Region
from ..model.loaded import Loaded
from .fakes import Collected, FakeDecoder, FakeKV, WholeKV, config, drain, expected_greedy, request

LENGTHS = (1, 2, 15, 16, 17, 40)


@pytest.fixture(scope="module", params=["olmoe", "deepseek_v3"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    path: Path = make_checkpoint(request.param, tmp_path_factory.mktemp("engine"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Loaded.open(path, "float32")
    torch.set_num_threads(threads)


def engine_on(loaded: Loaded, blocks: int, *, caching: bool, chunked: bool) -> Engine:
    kv = KVCache.allocate(loaded.files.config, "float32", blocks, 4)
    scheduler = SchedulerConfig(64, max_batched_tokens=24, chunked_prefill=chunked)
    return Engine(loaded.decoder, WholeKV(kv), SoloExchange(), EngineConfig(scheduler, VOCAB, (), caching))


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("blocks", [200, 30])
def test_greedy_tokens_are_those_of_each_request_alone(
    loaded: Loaded, blocks: int, chunked: bool, caching: bool
) -> None:
    prompts = [[(5 * i + 3 * n) % 256 for i in range(n)] for n in LENGTHS]
    engine = engine_on(loaded, blocks, caching=caching, chunked=chunked)
    for again in "ab":
        for prompt in prompts:
            engine.submit(request(f"{again}{len(prompt)}", prompt, max_tokens=12))
    collected = drain(engine, Collected())
    for prompt in prompts:
        alone = loaded.greedy(prompt, 12)
        assert collected.tokens[f"a{len(prompt)}"] == collected.tokens[f"b{len(prompt)}"] == alone
    assert (engine.stats.preemptions > 0) == (blocks == 30)
    if caching:
        engine.submit(request("hit", prompts[-1], max_tokens=12))
        hit = drain(engine, Collected())
        assert hit.ends["hit"].cached_tokens == 39
        assert hit.tokens["hit"] == loaded.greedy(prompts[-1], 12)


def poison(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, *innocent: list[int]) -> int:
    """A token that none of these sequences has; whatever follows it is not finite from now on."""
    token = next(i for i in range(VOCAB) if not any(i in tokens for tokens in innocent))
    embed = loaded.decoder._embed.clone()
    embed[token] = float("nan")
    monkeypatch.setattr(loaded.decoder, "_embed", embed)
    return token


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("leaves", [False, True])
def test_values_that_are_not_finite_stay_in_their_sequence(
    loaded: Loaded, caching: bool, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even its blocks spoil who gets them next; also where its client leaves before its logits are looked at."""
    good = [1, 2, 3, 4, 5]
    expected = loaded.greedy(good, 9)
    token = poison(loaded, monkeypatch, good, expected)
    engine = engine_on(loaded, 16, caching=caching, chunked=True)
    collected, forward = Collected(), loaded.decoder.forward

    def left(batch: Batch, cache: KVCache) -> Tensor:
        logits = forward(batch, cache)
        engine.abort(f"bad{round_}")
        return logits

    if leaves:
        monkeypatch.setattr(loaded.decoder, "forward", left)
    for round_ in range(3):
        for name, prompt in (("bad", [9, token, *range(28)]), ("good", good), ("late", [*good, token])):
            engine.submit(request(f"{name}{round_}", prompt, max_tokens=9))
        drain(engine, collected)
        assert collected.ends[f"bad{round_}"].finish_reason == ("abort" if leaves else "error")
        assert collected.ends[f"late{round_}"].finish_reason == "error"
        assert collected.tokens[f"good{round_}"] == expected


def test_values_that_are_not_finite_do_not_spread_within_a_batch(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block 0, with which a model could pad shorter tables, belongs to a prompt that is not finite."""
    prompts = {"good": [1, 2, 3, 4, 5], "longer": list(range(14))}
    expected = {name: loaded.greedy(prompt, 12) for name, prompt in prompts.items()}
    token = poison(loaded, monkeypatch, *prompts.values(), *expected.values())
    engine = engine_on(loaded, 40, caching=False, chunked=True)
    engine.submit(request("first", [7], max_tokens=1))
    for name, prompt in prompts.items():
        engine.submit(request(name, prompt, max_tokens=12))
    collected = Collected()
    collected.emit(engine.step())
    engine.submit(request("bad", [9, token, *range(48)], max_tokens=2))
    forward, tables = loaded.decoder.forward, list[list[int]]()

    def noted(batch: Batch, cache: KVCache) -> Tensor:
        tables.extend(list(table) for table in batch.block_tables)
        return forward(batch, cache)

    monkeypatch.setattr(loaded.decoder, "forward", noted)
    collected.emit(engine.step())
    assert 0 in max(tables, key=len)
    drain(engine, collected)
    assert collected.ends["bad"].finish_reason == "error"
    assert {name: collected.tokens[name] for name in prompts} == expected


@pytest.mark.parametrize("temperature", [0.8, 3.0])
def test_seeded_tokens_do_not_depend_on_the_batch(loaded: Loaded, temperature: float) -> None:
    def tokens(blocks: int, others: int) -> list[int]:
        engine = engine_on(loaded, blocks, caching=True, chunked=True)
        for i in range(others):
            engine.submit(request(f"o{i}", [i, 9, 9], max_tokens=20, temperature=1.0))
        engine.submit(request("x", [7, 8, 9], max_tokens=20, temperature=temperature, top_p=0.9, seed=11))
        return drain(engine, Collected()).tokens["x"]

    assert tokens(100, 0) == tokens(100, 5) == tokens(9, 5)


def test_lock_step_over_shared_memory() -> None:
    region = Region(2, 4096)
    exchanges = [region.member(rank) for rank in range(2)]
    engines = [Engine(FakeDecoder(), FakeKV(60), exchange, config(idle_wait_s=5.0)) for exchange in exchanges]
    collected = [Collected(), Collected()]
    ends: list[str] = []
    threads = [
        threading.Thread(target=lambda e=e, c=c: ends.append(e.run(c.emit)))  # type: ignore[misc]
        for e, c in zip(engines, collected, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        for i in range(6):  # each finds everybody asleep, or not
            rank = i % 2
            engines[rank].submit(request(str(i), [i, 2, 3], max_tokens=4))
            if i > 2:
                collected[rank].wait_for(lambda rank=rank, i=i: str(i) in collected[rank].ends)
        for i in range(6):
            collected[i % 2].wait_for(lambda i=i: str(i) in collected[i % 2].ends)
            assert collected[i % 2].tokens[str(i)] == expected_greedy([i, 2, 3], 4)
        engines[1].stop()
        for thread in threads:
            thread.join(20)
        assert ends == ["stopped", "stopped"]
        assert engines[0].stats.steps == engines[1].stats.steps
    finally:
        for exchange in exchanges:
            exchange.close()
        for thread in threads:
            thread.join(20)
        region.close()
