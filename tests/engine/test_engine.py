"""Engine alone: what comes out is what each request alone would give, however little memory there is (G6)."""

from __future__ import annotations

import pytest
from concertina.errors import InternalError, OperatorError, PeerLost
from concertina.workers.engine.core import EngineConfig
from concertina.workers.engine.engine import Engine
from concertina.workers.engine.errors import CacheTooSmall, InvalidRequest, NeverFits, QueueFull
from concertina.workers.engine.lockstep import Swap
from concertina.workers.engine.scheduler import SchedulerConfig
from concertina.workers.model.batch import Batch
from hypothesis import given, settings
from hypothesis import strategies as st

from .fakes import EOS, VOCAB, Collected, FakeDecoder, FakeKV, Hub, config, drain, expected_greedy, request, solo

prompts = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    prompts=prompts,
    blocks=st.integers(9, 30),
    budget=st.integers(1, 9),
    chunked=st.booleans(),
    caching=st.booleans(),
    temperature=st.sampled_from([0.0, 1.5]),
)
def test_results_do_not_depend_on_scheduling(
    prompts: list[list[int]], blocks: int, budget: int, chunked: bool, caching: bool, temperature: float
) -> None:
    setting = config(caching=caching, max_batched_tokens=budget, chunked_prefill=chunked)
    engine = solo(blocks, setting=setting)
    requests = [
        request(str(i), p, temperature=temperature, seed=i, max_tokens=3 + i, ignore_eos=True)
        for i, p in enumerate(prompts)
    ]
    for r in requests:
        engine.submit(r)
    together = drain(engine, Collected()).tokens
    for r in requests:
        one = solo()
        one.submit(r)
        assert drain(one, Collected()).tokens[r.id] == together[r.id]
        if temperature == 0.0:
            assert together[r.id] == expected_greedy(r.prompt, r.sampling.max_tokens)
    assert engine.load.kv_blocks_used == 0


@pytest.mark.parametrize(("come", "looks"), [(3, 3), (2, 8)])
def test_the_loop_lets_requests_come_but_not_for_ever(come: int, looks: int) -> None:
    """A request comes in each sleep; as many as are awaited, or one less."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) <= come:
            engine.submit(request(str(len(slept)), [1, 2, 3]))

    (exchange,) = Hub(1).members()
    engine = Engine(FakeDecoder(), FakeKV(64), exchange, config(), clock=lambda: sum(slept), sleep=sleep)
    engine.submit(request("a", [1, 2, 3]))
    with pytest.raises(InvalidRequest):
        engine.submit(request("b", []))
    engine.await_submissions(engine.submitted + 3, 0.0037)
    assert engine.submitted == 1 + come
    assert len(slept) == looks


def test_a_small_cache_preempts_without_changing_anything() -> None:
    engine = solo(12, setting=config(max_batched_tokens=32))
    for name in "abc":
        engine.submit(request(name, [ord(name) % 9, 2, 3], max_tokens=18))
    collected = drain(engine, Collected())
    assert engine.stats.preemptions > 0
    for name in "abc":
        assert collected.tokens[name] == expected_greedy([ord(name) % 9, 2, 3], 18)
        assert collected.ends[name].finish_reason == "length"


def test_ends_by_eos_stop_id_and_length() -> None:
    prompt = [1, 2, 3]
    tokens = expected_greedy(prompt, 8)
    stop = tokens[3]
    first = tokens.index(stop)
    cases = {
        "stop": request("r", prompt, max_tokens=8, stop_token_ids=(stop,)),
        "length": request("r", prompt, max_tokens=8),
    }
    for reason, r in cases.items():
        engine = solo()
        engine.submit(r)
        collected = drain(engine, Collected())
        assert collected.ends["r"].finish_reason == reason
        assert collected.tokens["r"] == (tokens[: first + 1] if reason == "stop" else tokens)


def test_eos_ends_unless_ignored_or_too_early() -> None:
    def run(**sampling: object) -> tuple[str | None, list[int]]:
        # With EOS far likelier than the toy model's favourite, whatever comes before.
        decoder = FakeDecoder()
        plain = decoder.forward

        def forward(batch: Batch, kv: FakeKV):  # type: ignore[no-untyped-def]
            logits = plain(batch, kv)
            logits[:, EOS] = 9.0
            return logits

        decoder.forward = forward  # type: ignore[method-assign]
        engine = solo(decoder=decoder)
        engine.submit(request("r", [1, 2], max_tokens=6, **sampling))
        collected = drain(engine, Collected())
        return collected.ends["r"].finish_reason, collected.tokens["r"]

    assert run() == ("stop", [EOS])
    assert run(ignore_eos=True) == ("length", [EOS] * 6)
    reason, tokens = run(min_tokens=3)
    assert reason == "stop"
    assert len(tokens) == 4
    assert EOS not in tokens[:3]


def test_prefix_hits_are_reported_and_change_nothing() -> None:
    engine = solo()
    engine.submit(request("a", [1, 2, 3, 4, 5]))
    first = drain(engine, Collected())
    engine.submit(request("b", [1, 2, 3, 4, 5]))
    second = drain(engine, Collected())
    assert first.ends["a"].cached_tokens == 0
    assert second.ends["b"].cached_tokens == 4
    assert first.tokens["a"] == second.tokens["b"]
    stats = engine.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens, stats.ended) == (10, 4, 10, 2)
    assert sum(stats.step_counts) == stats.steps > 0


def test_refusals_come_at_once_and_leave_nothing() -> None:
    engine = solo(8, setting=config(max_running=1, max_waiting=1))
    bad = {
        "prompt: empty": request("r", []),
        "token id 11 is outside": request("r", [1, VOCAB]),
        "token id -1 is outside": request("r", [-1]),
        "'x' is no token id": request("r", ["x"]),  # type: ignore[list-item]
        "stop_token_ids: token id 99": request("r", [1], stop_token_ids=(99,)),
        "max_tokens: 0": request("r", [1], max_tokens=0),
        "temperature: -1": request("r", [1], temperature=-1),
        "temperature: nan": request("r", [1], temperature=float("nan")),
        "top_p: 0": request("r", [1], top_p=0),
        "top_k: -1": request("r", [1], top_k=-1),
        "min_p: 2": request("r", [1], min_p=2),
        "seed: 'x'": request("r", [1], seed="x"),
        "min_tokens: 9": request("r", [1], min_tokens=9),
        "ignore_eos: 1": request("r", [1], ignore_eos=1),
        "logprobs: 12": request("r", [1], logprobs=12),
        "id: ''": request("", [1]),
    }
    for message, r in bad.items():
        with pytest.raises(InvalidRequest, match=message):
            engine.submit(r)
    with pytest.raises(NeverFits):
        engine.submit(request("r", [1] * 60))
    with pytest.raises(NeverFits, match="the whole cache has 8"):
        engine.submit(request("r", [1] * 15))
    engine.submit(request("a", [1]))
    engine.submit(request("b", [1]))
    with pytest.raises(QueueFull):
        engine.submit(request("c", [1]))
    assert set(drain(engine, Collected()).ends) == {"a", "b"}


def test_an_abort_frees_at_once_and_is_reported() -> None:
    engine = solo()
    for name in "ab":
        engine.submit(request(name, [1, 2, 3], max_tokens=20))
    collected = Collected()
    collected.emit(engine.step())
    used = engine.load.kv_blocks_used
    engine.abort("a")
    engine.abort("nobody")
    assert engine.load.kv_blocks_used == used // 2
    drain(engine, collected)
    assert collected.ends["a"].finish_reason == "abort"
    assert collected.tokens["b"] == expected_greedy([1, 2, 3], 20)


def test_an_abort_during_the_forward_pass() -> None:
    engine = solo(decoder=FakeDecoder(hook=lambda batch: engine.abort("a")))
    for name in "ab":
        engine.submit(request(name, [1, 2, 3]))
    collected = drain(engine, Collected())
    assert collected.ends["a"].finish_reason == "abort"
    assert collected.tokens["a"] == []
    assert collected.tokens["b"] == expected_greedy([1, 2, 3], 5)


def test_invalid_logits_end_one_sequence_only_and_spoil_no_cache() -> None:
    decoder = FakeDecoder(poison=7)
    engine = solo(decoder=decoder, setting=config(max_batched_tokens=8))
    engine.submit(request("bad", [1, 2, 3, 4, 5, 6, 7]))
    engine.submit(request("good", [1, 2], max_tokens=1))
    collected = drain(engine, Collected())
    assert collected.ends["bad"].finish_reason == "error"
    assert "not finite at position 7" in (collected.ends["bad"].error or "")
    assert collected.tokens["good"] == expected_greedy([1, 2], 1)
    engine.submit(request("again", [1, 2, 3, 4, 5, 6, 7]))
    assert drain(engine, Collected()).ends["again"].cached_tokens == 0


def test_an_error_in_the_model_propagates_and_no_sequence_is_lost() -> None:
    def fail(batch: Batch) -> None:
        if decoder.passes == 2:
            raise RuntimeError("out of memory")

    decoder = FakeDecoder(hook=fail)
    engine = solo(decoder=decoder)
    engine.submit(request("a", [1, 2, 3], max_tokens=9))
    collected = Collected()
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.run(collected.emit)
    decoder.hook = lambda batch: None
    drain(engine, collected)
    assert collected.tokens["a"] == expected_greedy([1, 2, 3], 9)


def test_what_ended_before_a_step_that_fails_is_reported_all_the_same() -> None:
    def fail(batch: Batch) -> None:
        raise PeerLost(0, "its process ended")

    decoder = FakeDecoder()
    engine = solo(decoder=decoder)
    for name in "ab":
        engine.submit(request(name, [1, 2, 3], max_tokens=9))
    collected = Collected()
    collected.emit(engine.step())
    engine.abort("b")
    decoder.hook = fail
    with pytest.raises(PeerLost):
        engine.run(collected.emit)
    decoder.hook = lambda batch: None
    assert drain(engine, collected).ends["b"].finish_reason == "abort"


def test_sequences_go_on_after_recovery_and_keep_their_kv() -> None:
    engine = solo(12)
    for name in "ab":
        engine.submit(request(name, [1, 2, 3], max_tokens=9))
    collected = Collected()
    for _ in range(4):
        collected.emit(engine.step())
    sizes: list[int] = []
    decoder, (exchange,) = FakeDecoder(hook=lambda batch: sizes.append(batch.tokens)), Hub(1).members()
    engine.recover(Swap(3, decoder, exchange))
    drain(engine, collected)
    assert engine.generation == 3
    assert sizes[0] == 2, "nothing is computed again"
    for name in "ab":
        assert collected.tokens[name] == expected_greedy([1, 2, 3], 9)


def test_what_no_longer_fits_is_to_go_on_elsewhere() -> None:
    engine = solo(12)
    engine.submit(request("long", [1, 2, 3], max_tokens=20))
    engine.submit(request("short", [1, 2, 3], max_tokens=5))
    collected = Collected()
    collected.emit(engine.step())
    assert len(engine.resize([], 5)) == 7
    drain(engine, collected)
    assert (collected.ends["long"].finish_reason, collected.ends["long"].moved_to) == ("moved", "")
    assert collected.tokens["long"] == expected_greedy([1, 2, 3], 20)[: len(collected.tokens["long"])] != []
    with pytest.raises(CacheTooSmall, match="the whole cache has 5"):
        engine.submit(request("long again", [1, 2, 3, 4], max_tokens=19))
    assert collected.tokens["short"] == expected_greedy([1, 2, 3], 5)
    assert engine.stats.preemptions == 0, "the other one had room"


def test_wrong_logits_and_configurations_are_errors() -> None:
    engine = solo(setting=EngineConfig(SchedulerConfig(64), VOCAB + 1))
    engine.submit(request("a", [1]))
    with pytest.raises(InternalError, match=r"shape \(1, 11\); expected \(1, 12\)"):
        engine.step()
    with pytest.raises(OperatorError, match="eos_ids"):
        EngineConfig(SchedulerConfig(64), 4, (4,))
    with pytest.raises(OperatorError, match="idle_wait_s"):
        config(idle_wait_s=0)


def test_a_wrong_request_is_refused_also_where_others_are_sent_on() -> None:
    engine = solo()
    engine.retire()
    assert engine.hand_over("cpu:1", running=True) == []
    with pytest.raises(InvalidRequest):
        engine.submit(request("a", [VOCAB]))
