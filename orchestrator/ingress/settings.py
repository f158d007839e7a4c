"""What the ingress is told once, when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import OperatorError


@dataclass(frozen=True, slots=True)
class IngressSettings:
    """Settings of one ingress replica.

    Parameters
    ----------
    model_names : tuple of str
        Names under which the model is served; the first is the main one.
    checkpoint : str
        Directory with the tokenizer (and its chat template, if any).
    max_model_len : int
        Most tokens of prompt and completion together.
    api_keys : tuple of str
        Accepted keys; empty means that no key is asked for. Never printed.
    max_waiting : int
        Sequences per worker that may wait for their first token; further requests get 429.
    max_body_bytes : int
        Largest request body.
    worker_wait_s : float
        How long a new request waits while no worker is connected, before it gets 503 (while the worker of some device
        is being replaced, as long as ``recovery_timeout_s``).
    recovery_timeout_s : float
        How long a sequence whose worker was lost waits for that one's device, and for any worker at all before it
        ends with an error.
    retry_after_s : int
        What 429 and 503 answers ask clients to wait.

    Raises
    ------
    OperatorError
        A value is out of range; the message names the field, the value and what was expected.
    """

    model_names: tuple[str, ...]
    checkpoint: str
    max_model_len: int
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_waiting: int = 256
    max_body_bytes: int = 8 << 20
    worker_wait_s: float = 5.0
    recovery_timeout_s: float = 60.0
    retry_after_s: int = 1

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise OperatorError(f"ingress: model_names: {self.model_names!r}: expected at least one name, none empty")
        if any(not key for key in self.api_keys):
            raise OperatorError("ingress: api_keys: one is empty; expected non-empty strings")
        for name in ("max_model_len", "max_waiting", "max_body_bytes", "retry_after_s"):
            self._at_least(name, 1)
        for name in ("worker_wait_s", "recovery_timeout_s"):
            self._at_least(name, 0)

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value < least:
            raise OperatorError(f"ingress: {name}: {value!r}: expected at least {least}")
