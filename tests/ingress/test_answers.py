"""What a real client gets on the good paths, streamed and not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from concertina.orchestrator.ingress.api_errors import ApiError
from concertina.orchestrator.ingress.completions import Completions
from concertina.orchestrator.ingress.fields import Fields
from concertina.orchestrator.ingress.tokenizer import Tokenizer
from openai import OpenAI

from .toy import EOS, Front, ToyWorker, saying, walk

Serve = Callable[..., Front]
CHAT = [{"role": "user", "content": "hello"}]


def client_of(front: Front) -> OpenAI:
    return OpenAI(base_url=f"{front.url}/v1", api_key="unused", max_retries=0, timeout=20)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(str(checkpoint))


@pytest.fixture
def client(serve: Serve) -> Iterator[OpenAI]:
    with client_of(serve(ToyWorker())) as client:
        yield client


def expected(tokenizer: Tokenizer, prompt: list[int], count: int, seed: int = 0) -> str:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(walk(tokens, seed))
    return tokenizer.decode(tokens[len(prompt) :])


def test_models(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["toy", "alias"]
    assert client.models.retrieve("alias").owned_by == "concertina"


def test_completion(client: OpenAI, tokenizer: Tokenizer) -> None:
    prompt = [5, 6, 7]
    answer = client.completions.create(model="toy", prompt=prompt, max_tokens=30)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "toy"
    assert answer.choices[0].text == expected(tokenizer, prompt, 30)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 30, 33)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_prompt_forms(client: OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer._encode("the fox", True)
    both = client.completions.create(model="toy", prompt=["the fox", "hello"], max_tokens=5)
    one = client.completions.create(model="toy", prompt="the fox", max_tokens=5)
    by_id = client.completions.create(model="toy", prompt=list(ids), max_tokens=5)
    by_ids = client.completions.create(model="toy", prompt=[list(ids), [9]], max_tokens=5)
    assert [c.index for c in both.choices] == [0, 1]
    assert both.choices[0].text == one.choices[0].text == by_id.choices[0].text == by_ids.choices[0].text
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == len(ids) + 1


def test_stream_equals_whole(client: OpenAI) -> None:
    whole = client.completions.create(model="toy", prompt="the fox", max_tokens=40, n=2, seed=3)
    parts = list(
        client.completions.create(
            model="toy",
            prompt="the fox",
            max_tokens=40,
            n=2,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    for index in (0, 1):
        mine = [p.choices[0] for p in parts if p.choices and p.choices[0].index == index]
        assert "".join(c.text for c in mine) == whole.choices[index].text
        assert [c.finish_reason for c in mine if c.finish_reason] == ["length"]
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage
    assert all(p.usage is None for p in parts[:-1])
    assert len({p.id for p in parts}) == 1
    assert whole.choices[0].text != whole.choices[1].text


def test_chat(client: OpenAI, tokenizer: Tokenizer) -> None:
    prompt = list(tokenizer._encode("user: hello\nassistant:", False))
    answer = client.chat.completions.create(model="toy", messages=CHAT, max_completion_tokens=20)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected(tokenizer, prompt, 20)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    parts = [{"type": "text", "text": "hello"}]
    again = client.chat.completions.create(model="toy", messages=[{"role": "user", "content": parts}], max_tokens=20)
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_chat_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="toy", messages=CHAT, max_tokens=20, n=3, seed=1)
    parts = list(client.chat.completions.create(model="toy", messages=CHAT, max_tokens=20, n=3, seed=1, stream=True))
    for index in range(3):
        mine = [p.choices[0] for p in parts if p.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert all(c.delta.role is None for c in mine[1:])
        assert "".join(c.delta.content or "" for c in mine) == whole.choices[index].message.content
        assert mine[-1].finish_reason == "length"
    assert all(p.usage is None for p in parts)


def test_chat_fills_the_context(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="toy", messages=CHAT)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 200
    assert answer.choices[0].finish_reason == "length"


def test_stop_strings(serve: Serve, tokenizer: Tokenizer) -> None:
    said = tokenizer._encode("one END two", False)
    worker = ToyWorker(script=saying(said, 1))
    client = client_of(serve(worker))
    for stop in ("END", ["zzz", "END"]):
        for batch in (1, 100):
            worker.batch = batch
            answer = client.completions.create(model="toy", prompt=[9], max_tokens=50, stop=stop)
            assert answer.choices[0].text == "one "
            assert answer.choices[0].finish_reason == "stop"
    assert worker.aborted, "the engine is told to stop where it would go on"
    chunks = client.completions.create(model="toy", prompt=[9], max_tokens=50, stop="END", stream=True)
    assert "".join(c.choices[0].text for c in chunks) == "one "


def test_stop_token_is_no_text(serve: Serve, tokenizer: Tokenizer) -> None:
    said = tokenizer._encode("one twX", False)
    client = client_of(serve(ToyWorker(script=saying(said, 1))))
    whole = client.completions.create(model="toy", prompt=[9], max_tokens=50)
    assert whole.choices[0].text == "one twX"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(said) + 1
    cut = client.completions.create(
        model="toy", prompt=[9], max_tokens=50, extra_body={"stop_token_ids": [said[-1]]}, logprobs=0
    )
    assert cut.choices[0].text == tokenizer.decode(said[:-1])
    assert cut.choices[0].logprobs is not None
    assert len(cut.choices[0].logprobs.tokens or []) == len(said) - 1


def test_completion_logprobs(serve: Serve, tokenizer: Tokenizer) -> None:
    said = tokenizer._encode("größer 中文 the fox", False)
    client = client_of(serve(ToyWorker(script=saying(said, 1))))
    answer = client.completions.create(model="toy", prompt=[9], max_tokens=12, logprobs=2)
    got, text = answer.choices[0].logprobs, answer.choices[0].text
    assert got is not None
    assert text == tokenizer.decode(said[:12])
    assert len(got.tokens or []) == len(got.token_logprobs or []) == len(got.text_offset or []) == len(said) == 7
    assert all(len(top) == 2 for top in got.top_logprobs or [])
    for token, offset in zip(got.tokens or [], got.text_offset or [], strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)
    parts = client.completions.create(model="toy", prompt=[9], max_tokens=12, logprobs=2, stream=True)
    streamed = [p.choices[0].logprobs for p in parts]
    assert [t for lp in streamed if lp for t in lp.tokens or []] == got.tokens
    assert [o for lp in streamed if lp for o in lp.text_offset or []] == got.text_offset


def test_chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="toy", messages=CHAT, max_tokens=12, logprobs=True, top_logprobs=3)
    got = answer.choices[0].logprobs
    assert got is not None
    assert got.content is not None
    assert len(got.content) == 12
    assert all(len(item.top_logprobs) == 3 and item.logprob == -0.5 for item in got.content)
    raw = b"".join(bytes(item.bytes or []) for item in got.content)
    assert raw.decode(errors="replace") == answer.choices[0].message.content
    bare = client.chat.completions.create(model="toy", messages=CHAT, max_tokens=2, logprobs=True)
    assert bare.choices[0].logprobs is not None
    assert [item.top_logprobs for item in bare.choices[0].logprobs.content or []] == [[], []]


def test_echo(client: OpenAI, tokenizer: Tokenizer) -> None:
    bare = client.completions.create(model="toy", prompt="the fox", max_tokens=5)
    echo = client.completions.create(model="toy", prompt="the fox", max_tokens=5, echo=True)
    assert echo.choices[0].text == "the fox" + bare.choices[0].text
    mixed: Any = ["the fox", list(tokenizer._encode("hello", True))]
    both = client.completions.create(model="toy", prompt=mixed, max_tokens=5, echo=True)
    assert both.choices[0].text == echo.choices[0].text
    assert both.choices[1].text.startswith("hello")


def test_sampling_fields_reach_the_engine(serve: Serve) -> None:
    worker = ToyWorker()
    client = client_of(serve(worker))
    extra = {"top_k": 7, "min_p": 0.1, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [EOS], "user": "me"}
    client.completions.create(
        model="toy", prompt=[9], max_tokens=6, temperature=0.5, top_p=0.9, seed=11, extra_body=extra
    )
    s = worker.requests[0].sampling
    assert (s.max_tokens, s.temperature, s.top_p, s.seed) == (6, 0.5, 0.9, 11)
    assert (s.top_k, s.min_p, s.min_tokens, s.ignore_eos, s.stop_token_ids) == (7, 0.1, 2, True, (EOS,))


def test_further_choices_follow_the_first_token(serve: Serve) -> None:
    """They find the prompt in the prefix cache, and differ by their seeds."""
    worker = ToyWorker(cached_tokens=1)
    front = serve(worker)
    front.run(worker.gate.clear)
    stream = client_of(front).completions.with_raw_response
    answers: list[object] = []
    thread = threading.Thread(
        target=lambda: answers.append(stream.create(model="toy", prompt=[9], max_tokens=4, n=3, seed=5).parse())
    )
    thread.start()
    front.until(lambda: len(worker.requests) == 1 and worker.outputs == 0)
    front.run(worker.gate.set)
    thread.join(20)
    assert len(worker.requests) == 3
    seeds = [r.sampling.seed for r in worker.requests]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert [r.admitted for r in worker.requests] == [False, True, True]  # so that no full queue refuses them
    assert not any(r.resumed for r in worker.requests)  # and no one else's request waits for them


def test_many_prompts_do_not_hold_the_streams_up(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a request are one piece of work beside the event loop, and too many are refused before it."""
    threads: list[int] = []

    def encode(text: str, special: bool) -> tuple[int, ...]:
        threads.append(threading.get_ident())
        return (len(text),)

    async def read(texts: list[str], most: int) -> tuple[tuple[int, ...], ...]:
        body = Fields({"model": "toy", "prompt": texts})
        return (await Completions().read(body, tokenizer, 10_000, most)).prompts

    monkeypatch.setattr(tokenizer, "_encode", encode)
    assert asyncio.run(read(["ab", "c"], 2)) == ((2,), (1,))
    assert set(threads) == {threading.get_ident()}
    threads.clear()
    with pytest.raises(ApiError, match="at most 3"):
        asyncio.run(read(["x" * 2000] * 4, 3))
    assert threads == []
    asyncio.run(read(["x" * 2000] * 4, 4))
    assert len(threads) == 4
    assert threading.get_ident() not in threads


def test_health_and_metrics(serve: Serve) -> None:
    front = serve(ToyWorker(cached_tokens=2))
    front.until(lambda: front.router.ready)
    client_of(front).completions.create(model="toy", prompt=[9, 9], max_tokens=4)
    assert httpx.get(f"{front.url}/health").json() == {"status": "ok", "workers": 1, "connected": 1, "awaited": 0}
    lines = httpx.get(f"{front.url}/metrics").text.splitlines()
    assert 'concertina_requests_total{endpoint="/v1/completions",status="200"} 1.0' in lines
    for line in (
        "concertina_prompt_tokens_total 2.0",
        "concertina_cached_prompt_tokens_total 2.0",
        "concertina_generated_tokens_total 4.0",
        "concertina_running 0.0",
        "concertina_waiting 0.0",
        "concertina_time_to_first_token_seconds_count 1.0",
        "concertina_inter_token_seconds_count 3.0",
        'concertina_worker_outstanding_tokens{worker="w0"} 0.0',
        'concertina_worker_engine_running{worker="w0"} 3.0',
    ):
        assert line in lines
