"""What a deployment may be told."""

from __future__ import annotations

import re
from typing import Any

import pytest
from concertina.errors import OperatorError
from concertina.orchestrator.config import DeploymentConfig, EndpointOptions, EngineOptions, parse_bytes, parse_seconds
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        ("0", 0),
        ("1k", 1000),
        ("1KiB", 1024),
        ("512MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        (" 2 Gi ", 2 << 30),
        ("3tib", 3 << 40),
        ("7B", 7),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "many", "-1", "1.5.2", "1 PB", "GiB", "1e9", "0x10"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(OperatorError, match=re.escape(repr(text))):
        parse_bytes(text)


@given(st.integers(0, 1 << 50))
def test_whole_numbers_are_bytes(n: int) -> None:
    assert parse_bytes(str(n)) == n
    assert parse_bytes(f"{n % 1000}MiB") == (n % 1000) << 20


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"workers": 0}, "workers: 0"),
        ({"name": "a/b"}, "name: 'a/b'"),
        ({"name": ""}, "name: ''"),
        ({"name": "-x"}, "name: '-x'"),
        ({"exchange_timeout_s": 0}, "exchange-timeout: 0"),
        ({"hang_timeout_s": -1.0}, "hang-timeout: -1.0"),
        ({"hang_timeout_s": float("nan")}, "hang-timeout: nan"),
        ({"hang_timeout_s": float("inf")}, "hang-timeout: inf"),
        ({"start_timeout_s": 0.0}, "start-timeout: 0.0"),
        ({"standbys": -1}, "standbys: -1"),
        ({"rebalance_s": float("nan")}, "rebalance-interval: nan"),
        ({"memory_mode": "both"}, "memory: 'both'; expected one of shared, separate"),
        ({"reserve_memory": True}, "reserve-memory: devices that share their node's memory have none"),
        ({"token": "short"}, "token: expected at least 16"),
        ({"spare_slots": -1}, "spare-slots: -1"),
        ({"rebalance_s": -0.5}, "rebalance-interval: -0.5"),
        ({"engine": EngineOptions(max_batched_tokens=0)}, "max-batched-tokens: 0"),
        ({"engine": EngineOptions(max_running=-3)}, "max-running: -3"),
        ({"engine": EngineOptions(block_tokens=0)}, "block-tokens: 0"),
        (
            {"engine": EngineOptions(emulated_step_ms=-1.5)},
            "emulated-step-ms: -1.5; expected a finite number of millis",
        ),
        ({"engine": EngineOptions(emulated_step_ms=float("nan"))}, "emulated-step-ms: nan"),
        ({"engine": EngineOptions(emulated_step_ms=float("inf"))}, "emulated-step-ms: inf"),
    ],
)
def test_a_field_out_of_range_is_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(OperatorError, match=re.escape(says)):
        DeploymentConfig("here", **fields)


@pytest.mark.parametrize("option", ["max_model_len", "threads"])
def test_zero_is_not_the_same_as_nothing(option: str) -> None:
    with pytest.raises(OperatorError, match=re.escape(f"{option.replace('_', '-')}: 0")):
        DeploymentConfig("here", engine=EngineOptions(**{option: 0}))


@pytest.mark.parametrize(
    ("text", "seconds"), [("60s", 60.0), ("1.5", 1.5), ("500 ms", 0.5), ("2m", 120.0), ("1H", 3600.0), ("0", 0.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1d", "1m30s", "inf", "nan", "1e3"])
def test_what_is_no_duration_is_named(text: str) -> None:
    with pytest.raises(OperatorError, match=re.escape(repr(text))):
        parse_seconds(text)


def test_secrets_are_not_shown() -> None:
    config = DeploymentConfig("here", endpoint=EndpointOptions(api_keys=("sesame",)))
    assert config.token not in repr(config)
    assert "sesame" not in repr(config)
    assert config.token != DeploymentConfig("here").token
