"""What a deployment is told to be: one frozen value, validated once."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from math import inf
from typing import Literal, get_args

from ..errors import OperatorError
from ..planners.cluster import Device
from .core.inventory import Entry, Inventory, Kind

NAMESPACE = "concertina"
DEFAULT_NAME = "concertina"  # of a deployment
ANY_NODE = "node0"  # what a cluster file says of devices whose node it does not name
Exchange = Literal["auto", "shared", "gloo"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
MemoryMode = Literal["shared", "separate"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?", re.IGNORECASE)
_SECONDS = {"ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_TOKEN = re.compile(r"[!-~]{16,}")  # printable, no space: it travels in options, files and headers
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


def parse_seconds(text: str) -> float:
    """Seconds of a duration such as ``60s``, ``500ms``, ``2m``, ``1h`` or ``1.5``.

    Raises
    ------
    OperatorError
        The text is no duration.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise OperatorError(f"{text!r} is not a duration; expected for instance 60s, 500ms or 2m")
    return float(match[1]) * _SECONDS[(match[2] or "").lower()]


def check_token(token: str) -> str:
    """The token, if it can be one.

    Raises
    ------
    OperatorError
        It is too short to be a secret, or has spaces or characters that are not ASCII. It is not shown.
    """
    if not _TOKEN.fullmatch(token):
        raise OperatorError("token: expected at least 16 printable ASCII characters without spaces")
    return token


@dataclass(frozen=True)
class EngineOptions:
    """Limits of every worker's engine. Lengths and budgets in tokens, counts in sequences.

    ``max_model_len`` None takes the model's own; ``max_waiting`` is per worker. Every step takes ``emulated_step_ms``
    milliseconds at least, as if an accelerator computed and left the host's cores alone; 0 emulates nothing.
    """

    max_model_len: int | None = None
    max_batched_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 256
    block_tokens: int = 16
    prefix_caching: bool = True
    chunked_prefill: bool = True
    threads: int | None = None
    emulated_step_ms: float = 0.0


@dataclass(frozen=True)
class EndpointOptions:
    """Where and for whom the endpoint listens. Without ``api_keys`` everyone who reaches it is served.

    Of ``replicas`` one answers; the others stand by.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 2
    model_name: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


@dataclass(frozen=True)
class DeploymentConfig:
    """Everything `concertina serve` was told.

    Parameters
    ----------
    device_memory_bytes : int or None
        Pages that each device holds; None takes what fits this node.
    fleet : tuple of Device
        The devices that there may be, where they are not all alike; they have memories of their own sizes then.
    spare_slots : int
        Physical experts per MoE layer beyond one of each, rounded up so that all devices have equally many slots.
    rebalance_s : float
        Time between two looks at whether experts should move; 0 never moves them.
    loads_file : str or None
        Measured loads: read at the start if it is there, kept up to date.
    exchange_timeout_s : float
        A peer that does not answer for so long counts as hung. So does an engine that makes no progress for so long:
        it must exceed what a worker computes between two exchanges of tokens, of which a layer has one or two.
    memory_mode : {"shared", "separate"}
        Whether the devices of a node share its memory, or have one of their own each, which keep what they have taken.
    reserve_memory : bool
        Whether devices with memory of their own take all of it at the start and keep it.
    standbys : int
        Idle workers kept on every node that serves: one takes a dead worker's place, or a new device, at once.
    hang_timeout_s : float
        A worker or memory owner that does not answer the controller for so long is killed, and so is a controller that
        does not answer ``concertina serve``.
    start_timeout_s : float
        A worker or memory owner that has a process for so long and has not answered once is killed. A worker
        imports torch: 1.2 s on an idle core, many times that where many start at once or others serve.
    token : str
        The deployment's secret between its own processes; whoever has it may scale and drain.
    """

    checkpoint: str
    workers: int = 1
    name: str = DEFAULT_NAME
    dtype: Dtype = "auto"
    exchange: Exchange = "auto"
    placement_file: str | None = None
    device_memory_bytes: int | None = None
    fleet: tuple[Device, ...] = ()
    spare_slots: int = 0
    rebalance_s: float = 60.0
    loads_file: str | None = None
    exchange_timeout_s: float = 60.0
    memory_mode: MemoryMode = "shared"
    reserve_memory: bool = False
    standbys: int = 1
    hang_timeout_s: float = 20.0
    start_timeout_s: float = 120.0
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
            "ingress-replicas": self.endpoint.replicas,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                raise OperatorError(f"{name.replace('_', '-')}: {value} is too small; expected at least 1")
        if not _NAME.fullmatch(self.name):
            raise OperatorError(f"name: {self.name!r}; expected letters, digits, dots, dashes and underscores")
        self._check_limits()
        self._check_fleet()
        if self.memory_mode not in get_args(MemoryMode):
            raise OperatorError(f"memory: {self.memory_mode!r}; expected one of {', '.join(get_args(MemoryMode))}")
        if self.reserve_memory and self.memory_mode == "shared":
            raise OperatorError(
                "reserve-memory: devices that share their node's memory have none; use --memory separate"
            )
        check_token(self.token)

    @property
    def device_bytes(self) -> int | None:
        """Memory of a device, or of one of the largest kind; None takes what fits the node."""
        return max((device.memory_bytes for device in self.fleet), default=self.device_memory_bytes)

    @property
    def inventory(self) -> Inventory:
        """The devices that there may be."""
        most = self.device_bytes or 1
        return Inventory(
            tuple(
                Entry(
                    device.name,
                    Kind(device.kind, device.flops, device.bandwidth_bytes_s, device.memory_bytes / most),
                    "" if device.node == ANY_NODE else device.node,
                )
                for device in self.fleet
            )
        )

    def _check_fleet(self) -> None:
        if not self.fleet:
            return
        if self.device_memory_bytes is not None:
            raise OperatorError("device-memory: the cluster file says what each kind of device holds; give one of them")
        if self.workers > len(self.fleet):
            raise OperatorError(f"workers: {self.workers}; the cluster file lists {len(self.fleet)} devices")
        odd = next((d for d in self.fleet if not _NAME.fullmatch(d.name)), None)
        if odd is not None:
            raise OperatorError(f"cluster: device {odd.name!r}; expected letters, digits, dots, dashes and underscores")
        empty = next((d for d in self.fleet if d.memory_bytes <= 0), None)
        if empty is not None:
            raise OperatorError(f"cluster: kind {empty.kind}: memory: {empty.memory_bytes}; expected more than 0")

    def _check_limits(self) -> None:
        at_least_0 = {
            "spare-slots": self.spare_slots,
            "rebalance-interval": self.rebalance_s,
            "standbys": self.standbys,
        }
        for name, number in at_least_0.items():
            if not number >= 0:  # NaN is neither
                raise OperatorError(f"{name}: {number}; expected 0 or more")
        above_0 = {
            "exchange-timeout": self.exchange_timeout_s,
            "hang-timeout": self.hang_timeout_s,
            "start-timeout": self.start_timeout_s,
        }
        for name, seconds in above_0.items():
            if not 0 < seconds < inf:
                raise OperatorError(f"{name}: {seconds}; expected a number of seconds above 0")
        if not 0 <= self.engine.emulated_step_ms < inf:
            raise OperatorError(
                f"emulated-step-ms: {self.engine.emulated_step_ms}; "
                "expected a finite number of milliseconds, 0 or more (0 emulates nothing)"
            )
