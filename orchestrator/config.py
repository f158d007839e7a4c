"""What a deployment is told to be: one frozen value, validated once."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from typing import Literal

from ..errors import OperatorError

NAMESPACE = "concertina"
Exchange = Literal["auto", "shared", "gloo"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``512MiB``, ``1.5GB`` or ``4096``.

    Raises
    ------
    OperatorError
        The text is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise OperatorError(f"{text!r} is not a size; expected for instance 512MiB or 4GB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


@dataclass(frozen=True)
class EngineOptions:
    """Limits of every worker's engine. Lengths and budgets in tokens, counts in sequences.

    ``max_model_len`` None takes the model's own; ``max_waiting`` is per worker.
    """

    max_model_len: int | None = None
    max_batched_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 256
    block_tokens: int = 16
    prefix_caching: bool = True
    chunked_prefill: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class EndpointOptions:
    """Where and for whom the endpoint listens. Without ``api_keys`` everyone who reaches it is served."""

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class DeploymentConfig:
    """Everything `concertina serve` was told.

    Parameters
    ----------
    device_memory_bytes : int or None
        Pages that each device holds; None takes what fits this node.
    spare_slots : int
        Physical experts per MoE layer beyond one of each, rounded up so that all devices have equally many slots.
    rebalance_s : float
        Time between two looks at whether experts should move; 0 never moves them.
    loads_file : str or None
        Measured loads: read at the start if it is there, kept up to date.
    exchange_timeout_s : float
        A peer that does not answer for so long counts as hung.
    token : str
        The deployment's secret between its own processes.
    """

    checkpoint: str
    workers: int = 1
    name: str = "concertina"
    dtype: Dtype = "auto"
    exchange: Exchange = "auto"
    placement_file: str | None = None
    device_memory_bytes: int | None = None
    spare_slots: int = 0
    rebalance_s: float = 60.0
    loads_file: str | None = None
    exchange_timeout_s: float = 60.0
    engine: EngineOptions = EngineOptions()
    endpoint: EndpointOptions = EndpointOptions()
    token: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    def __post_init__(self) -> None:
        positive = {
            "workers": self.workers,
            "max_batched_tokens": self.engine.max_batched_tokens,
            "max_running": self.engine.max_running,
            "max_waiting": self.engine.max_waiting,
            "block_tokens": self.engine.block_tokens,
            "max_model_len": self.engine.max_model_len,
            "threads": self.engine.threads,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                raise OperatorError(f"{name.replace('_', '-')}: {value} is too small; expected at least 1")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise OperatorError(f"name: {self.name!r}; expected letters, digits, dots, dashes and underscores")
        for name, number in {"spare-slots": self.spare_slots, "rebalance-interval": self.rebalance_s}.items():
            if number < 0:
                raise OperatorError(f"{name}: {number}; expected 0 or more")
        if self.exchange_timeout_s <= 0:
            raise OperatorError(f"exchange-timeout: {self.exchange_timeout_s}; expected more than 0 seconds")
