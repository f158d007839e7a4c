"""Every wrong request gets an OpenAI-shaped error that names what is wrong."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from concertina.errors import OperatorError
from concertina.orchestrator.ingress.members import Member
from concertina.orchestrator.ingress.settings import IngressSettings
from concertina.orchestrator.ingress.tokenizer import Tokenizer
from concertina.workers.engine.errors import InvalidRequest, NeverFits, QueueFull
from openai import APIError, AuthenticationError, BadRequestError, NotFoundError, OpenAI, RateLimitError

from . import checkpoints
from .toy import Front, ToyWorker

Serve = Callable[..., Front]
GOOD = {"model": "toy", "prompt": [9], "max_tokens": 2}
CHAT = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def front(checkpoint: Path) -> Iterator[Front]:
    settings = IngressSettings(("toy",), str(checkpoint), 50, max_waiting=3, max_body_bytes=20_000)
    with Front(settings, [ToyWorker()]) as front:
        yield front


def post(front: Front, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body)
    return httpx.post(front.url + path, content=content, timeout=20, verify=False, **options)  # no certificates: fast


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


COMPLETION_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "''"),
    ({"prompt": []}, "prompt", "[]"),
    ({"prompt": ["a", ""]}, "prompt", "['a', '']"),
    ({"prompt": [[]]}, "prompt", "[[]]"),
    ({"prompt": None}, "prompt", "None"),
    ({"prompt": 5}, "prompt", "5"),
    ({"prompt": {"a": 1}}, "prompt", "{'a': 1}"),
    ({"prompt": [1.5]}, "prompt", "[1.5]"),
    ({"prompt": [True]}, "prompt", "[True]"),
    ({"prompt": [-1]}, "prompt", "[-1]"),
    ({"prompt": [10**7]}, "prompt", "ids from 0 to"),
    ({"prompt": [[1], [2, "x"]]}, "prompt", "ids from 0 to"),
    ({"prompt": ["a"] * 4}, "prompt", "at most 3"),
    ({"model": 5}, "model", "non-empty string"),
    ({"max_tokens": 0}, "max_tokens", "from 1 to"),
    ({"max_tokens": "5"}, "max_tokens", "'5'"),
    ({"max_tokens": 2.0}, "max_tokens", "2.0"),
    ({"max_tokens": True}, "max_tokens", "True"),
    ({"temperature": -0.1}, "temperature", "from 0 to 2"),
    ({"temperature": "hot"}, "temperature", "'hot'"),
    ({"temperature": 10**400}, "temperature", "from 0 to 2"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_k": 1.5}, "top_k", "1.5"),
    ({"top_k": -2}, "top_k", "-1"),
    ({"min_p": 1.1}, "min_p", "from 0 to 1"),
    ({"min_tokens": 3}, "min_tokens", "from 0 to 2"),
    ({"seed": 2**64}, "seed", "an integer from"),
    ({"seed": "x"}, "seed", "'x'"),
    ({"n": 0}, "n", "from 1 to 128"),
    ({"n": 129}, "n", "from 1 to 128"),
    ({"n": 2, "prompt": ["a", "b"]}, "n", "4 sequences of all prompts: expected at most 3"),
    ({"stop": ["a"] * 17}, "stop", "up to 16"),
    ({"stop": [""]}, "stop", "up to 16"),
    ({"stop": 5}, "stop", "5"),
    ({"stop": "x" * 2000}, "stop", "1024"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "from 0 to"),
    ({"stop_token_ids": 3}, "stop_token_ids", "3"),
    ({"stop_token_ids": [1] * 200}, "stop_token_ids", "at most 128"),
    ({"ignore_eos": "yes"}, "ignore_eos", "true or false"),
    ({"stream": 1}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "when stream is true"),
    ({"stream": True, "stream_options": {"include_usage": 5}}, "stream_options.include_usage", "5"),
    ({"stream": True, "stream_options": []}, "stream_options", "object"),
    ({"logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"logprobs": True}, "logprobs", "True"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"echo": True, "logprobs": 1}, "echo", "prompt"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
    ({"frequency_penalty": 1}, "frequency_penalty", "not supported"),
    ({"repetition_penalty": 1.1}, "repetition_penalty", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ({"guided_json": "{}"}, "guided_json", "not supported"),
]


@pytest.mark.parametrize(("fault", "param", "says"), COMPLETION_FAULTS, ids=lambda x: str(x)[:30])
def test_completion_faults(front: Front, fault: dict[str, Any], param: str, says: str) -> None:
    answer = post(front, {**GOOD, **fault})
    error = error_of(answer)
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert says in error["message"]


CHAT_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "[]"),
    ({"messages": "hi"}, "messages", "'hi'"),
    ({"messages": ["hi"]}, "messages", "list of objects"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "5"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "text parts"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "object"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "missing"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "image_url",
    ),
    ({"messages": [{"role": "forbidden", "content": "x"}]}, "messages", "no such role"),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls",
        "not supported",
    ),
    ({"logprobs": 3}, "logprobs", "true or false"),
    ({"top_logprobs": 3}, "top_logprobs", "when logprobs is true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    ({"max_completion_tokens": 3}, "max_tokens", "differ"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"tool_choice": "auto"}, "tool_choice", "'none'"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"modalities": ["audio"]}, "modalities", "not supported"),
    ({"chat_template": "{{ x }}"}, "chat_template", "not supported"),
    ({"chat_template_kwargs": 5}, "chat_template_kwargs", "object"),
    ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs.chat_template", "not supported"),
    ({"chat_template_kwargs": {"tools": [{}]}}, "chat_template_kwargs.tools", "not supported"),
]


@pytest.mark.parametrize(("fault", "param", "says"), CHAT_FAULTS, ids=lambda x: str(x)[:30])
def test_chat_faults(front: Front, fault: dict[str, Any], param: str, says: str) -> None:
    answer = post(front, {**CHAT, **fault}, "/v1/chat/completions")
    error = error_of(answer)
    assert answer.status_code == 400
    assert error["param"] == param
    assert says in error["message"]


def test_harmless_fields_are_accepted(front: Front) -> None:
    neutral = {
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "top_k": -1,
        "seed": None,
        "stop": None,
        "unheard_of": 1,
    }
    assert post(front, {**GOOD, **neutral, "best_of": 1, "suffix": None}).status_code == 200
    chat = {**CHAT, **neutral, "tools": [], "tool_choice": "none", "parallel_tool_calls": True}
    assert post(front, chat, "/v1/chat/completions").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"[" * 15_000,
        b'{"model": "toy", "prompt": "\\ud800"}',
        b'{"model": "toy", "prompt": "\xed\xa0\x80"}',
    ],
    ids=["empty", "cut", "list", "string", "bytes", "deep", "surrogate", "raw surrogate"],
)
def test_bodies_that_are_no_json_object(front: Front, body: bytes) -> None:
    answer = post(front, body)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "invalid_json"


def test_not_a_number(front: Front) -> None:
    answer = post(front, b'{"model": "toy", "prompt": "x", "temperature": NaN}')
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "temperature"


def test_too_large(front: Front) -> None:
    big = b'{"prompt": "' + b"x" * 30_000 + b'"}'
    assert post(front, big).status_code == 413

    def chunks() -> Iterator[bytes]:
        yield from (big[i : i + 4096] for i in range(0, len(big), 4096))

    answer = httpx.post(f"{front.url}/v1/completions", content=chunks(), timeout=20)
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "request_too_large"


def test_context_length(front: Front) -> None:
    for body in ({"prompt": [9] * 40, "max_tokens": 11}, {"prompt": [9] * 50}, {"prompt": [[9], [9] * 45]}):
        answer = post(front, {**GOOD, "max_tokens": 11, **body})
        error = error_of(answer)
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
        assert "50 tokens" in error["message"]
    assert post(front, {**GOOD, "prompt": [9] * 40, "max_tokens": 10}).status_code == 200
    unasked = post(front, {**GOOD, "prompt": [9] * 40, "max_tokens": None})
    assert unasked.json()["usage"]["completion_tokens"] == 10
    long = {**CHAT, "max_tokens": None, "messages": [{"role": "user", "content": "x " * 60}]}
    answer = post(front, long, "/v1/chat/completions")
    assert error_of(answer)["code"] == "context_length_exceeded"
    assert error_of(answer)["param"] == "messages"


def test_unknown_model_and_paths(front: Front) -> None:
    client = OpenAI(base_url=f"{front.url}/v1", api_key="x", max_retries=0)
    with pytest.raises(NotFoundError) as e:
        client.completions.create(model="other", prompt="x")
    assert e.value.code == "model_not_found"
    with pytest.raises(NotFoundError) as e:
        client.models.retrieve("other/model")
    assert e.value.code == "model_not_found"
    assert "model is missing" in error_of(post(front, {"prompt": "x"}))["message"]
    for answer in (httpx.get(f"{front.url}/v1/nothing"), httpx.get(f"{front.url}/v1/completions")):
        assert answer.status_code in (404, 405)
        assert error_of(answer)["type"] == "invalid_request_error"


def test_api_keys(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "concertina")
    front = serve(ToyWorker(), api_keys=("first-secret", "second-secret"))
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-secret"}):
        for answer in (post(front, GOOD, headers=header), httpx.get(f"{front.url}/v1/models", headers=header)):
            assert answer.status_code == 401
            assert error_of(answer)["code"] == "invalid_api_key"
    for key in ("first-secret", "second-secret"):
        client = OpenAI(base_url=f"{front.url}/v1", api_key=key, max_retries=0)
        client.completions.create(model="toy", prompt="x")
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{front.url}/v1", api_key="second", max_retries=0).models.list()
    assert httpx.get(f"{front.url}/metrics").status_code == 200
    assert "secret" not in caplog.text
    assert "secret" not in repr(IngressSettings(("toy",), "x", 5, api_keys=("first-secret",)))


def test_no_chat_template(tmp_path: Path, serve: Serve) -> None:
    bare = checkpoints.byte_level(tmp_path, template=None)
    answer = post(serve(ToyWorker(), checkpoint=str(bare)), CHAT, "/v1/chat/completions")
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "no_chat_template"


def test_queue_full(serve: Serve) -> None:
    worker = ToyWorker()
    front = serve(worker, max_waiting=2, retry_after_s=7)
    front.run(worker.gate.clear)
    with httpx.Client(timeout=20) as first:
        request = first.build_request("POST", f"{front.url}/v1/completions", json={**GOOD, "prompt": ["a", "b"]})
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(first.send(request)))
        thread.start()
        front.until(lambda: len(worker.requests) == 2)
        refused = post(front, GOOD)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "7"
        assert error_of(refused)["type"] == "rate_limit_error"
        with pytest.raises(RateLimitError):
            OpenAI(base_url=f"{front.url}/v1", api_key="x", max_retries=0).completions.create(**GOOD)  # type: ignore[call-overload]
        front.run(worker.gate.set)
        thread.join(20)
    assert answers[0].status_code == 200
    assert post(front, GOOD).status_code == 200


def test_the_queue_grows_and_shrinks_with_the_workers(serve: Serve) -> None:
    workers = [ToyWorker("w0"), ToyWorker("w1"), ToyWorker("w2")]
    front = serve(*workers, max_waiting=2)
    for count in (3, 1, 2):
        front.run(lambda count=count: front.router.update([w.member for w in workers[:count]]))
        assert post(front, {**GOOD, "prompt": ["a"] * 2 * count}).status_code == 200
        answer = post(front, {**GOOD, "prompt": ["a"] * (2 * count + 1)})
        assert answer.status_code == 400
        assert f"at most {2 * count}" in error_of(answer)["message"]
    draining = Member("w1", "toy", 1, draining=True)
    front.run(lambda: front.router.update([workers[0].member, draining], {"w2"}))
    assert front.router.workers == 2  # one takes requests, one is being replaced


@pytest.mark.parametrize("n", [1, 4])
def test_a_burst_does_not_pass_the_queue_together(serve: Serve, n: int) -> None:
    """Further choices count, though they are submitted later."""
    worker = ToyWorker()
    front = serve(worker, max_waiting=5 * n)
    front.run(worker.gate.clear)

    async def burst() -> list[int]:
        async with httpx.AsyncClient(timeout=20) as client:
            tasks = [
                asyncio.create_task(client.post(f"{front.url}/v1/completions", json={**GOOD, "n": n}))
                for _ in range(30)
            ]
            done = 0
            while done < 25:
                await asyncio.sleep(0.01)
                done = sum(task.done() for task in tasks)
            front.run(worker.gate.set)
            return [(await task).status_code for task in tasks]

    statuses = asyncio.run(burst())
    assert sorted(statuses) == [200] * 5 + [429] * 25


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (QueueFull("full"), 429, "queue_full"),
        (NeverFits("needs 9 blocks of 8"), 400, "context_length_exceeded"),
        (InvalidRequest("prompt: bad"), 400, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_engine_refusals(serve: Serve, refusal: Exception, status: int, code: str | None, stream: bool) -> None:
    answer = post(serve(ToyWorker(refuse=refusal)), {**GOOD, "stream": stream})
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)


@pytest.mark.parametrize("stream", [False, True])
def test_no_worker(serve: Serve, stream: bool) -> None:
    front = serve(ToyWorker(down=True), worker_wait_s=0.05, retry_after_s=3)
    answer = post(front, {**GOOD, "stream": stream})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "3"
    assert error_of(answer)["type"] == "server_error"
    assert httpx.get(f"{front.url}/health").status_code == 503


def test_engine_fault(serve: Serve) -> None:
    worker = ToyWorker(error="out of pages")
    front = serve(worker)
    answer = post(front, GOOD)
    assert answer.status_code == 500
    assert "out of pages" in error_of(answer)["message"]
    metrics = httpx.get(f"{front.url}/metrics").text
    assert 'concertina_requests_total{endpoint="/v1/completions",status="500"} 1.0' in metrics


def test_error_in_mid_stream(serve: Serve) -> None:
    """The tokens that came are delivered, then an event that the client raises."""
    worker = ToyWorker(die_after=3, step_s=0.02)
    front = serve(worker, recovery_timeout_s=0.05)
    client = OpenAI(base_url=f"{front.url}/v1", api_key="x", max_retries=0)
    stream = client.completions.create(model="toy", prompt=[9], max_tokens=9, stream=True)
    assert next(stream).choices[0].text
    with pytest.raises(APIError, match="no worker took the sequence over"):
        list(stream)


def test_benign_client_mistakes_are_typed(front: Front) -> None:
    client = OpenAI(base_url=f"{front.url}/v1", api_key="x", max_retries=0)
    with pytest.raises(BadRequestError) as e:
        client.completions.create(model="toy", prompt="", max_tokens=2)
    assert e.value.param == "prompt"


@pytest.mark.parametrize(
    "fault",
    [{"model_names": ()}, {"model_names": ("",)}, {"max_model_len": 0}, {"api_keys": ("",)}, {"worker_wait_s": -1}],
)
def test_settings(fault: dict[str, Any]) -> None:
    good: dict[str, Any] = {"model_names": ("toy",), "checkpoint": "x", "max_model_len": 5}
    with pytest.raises(OperatorError, match=next(iter(fault))):
        IngressSettings(**{**good, **fault})


def test_bad_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="expected a directory"):
        Tokenizer.load(str(tmp_path / "none"))
    with pytest.raises(OperatorError, match="no readable tokenizer"):
        Tokenizer.load(str(tmp_path))
    broken = checkpoints.byte_level(tmp_path / "broken")
    (broken / "generation_config.json").write_text("{")
    with pytest.raises(OperatorError, match=r"generation_config\.json: not JSON"):
        Tokenizer.load(str(broken))
