"""What a run tells its caller, while it runs and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from ...errors import ConcertinaError, OperatorError
from .step import StepResult


class TrainingStopped(ConcertinaError):
    """The run was asked to stop; its state is saved.

    Parameters
    ----------
    step, steps : int
        Steps done and to do.
    folder : str
        Where the state is.
    """

    def __init__(self, step: int, steps: int, folder: str) -> None:
        super().__init__(step, steps, folder)
        self.step, self.steps, self.folder = step, steps, folder

    def __str__(self) -> str:
        return (
            f"stopped after step {self.step} of {self.steps}; the state is saved in {self.folder}: "
            f"run the same command again to go on from there"
        )


@dataclass(frozen=True)
class RunStart:
    """What is about to be trained, from which step."""

    parameters: int
    active_parameters: int
    train_bytes: int
    held_out_bytes: int
    source: str
    first_step: int
    steps: int
    batch_tokens: int


class Progress(Protocol):
    """Who watches a run; every method returns at once."""

    def start(self, run: RunStart) -> None:
        """The first step comes next."""

    def step(self, number: int, result: StepResult) -> None:
        """Step ``number``, counted from 1, is done."""

    def evaluating(self, done: int, total: int) -> None:
        """That many tokens of the held-out text are done."""


class Silent:
    """Watches nothing."""

    def start(self, run: RunStart) -> None:
        return None

    def step(self, number: int, result: StepResult) -> None:
        return None

    def evaluating(self, done: int, total: int) -> None:
        return None


@dataclass(frozen=True)
class Summary:
    """A finished run.

    Parameters
    ----------
    steps, tokens : int
        Optimizer steps, and bytes predicted by them.
    wall_s, cpu_s, tokens_per_s : float
        Time spent in steps by the session that finished the run, and its rate.
    session_steps : int
        Steps that this session did; fewer than ``steps`` where it resumed.
    train_bits : float
        Training loss in bits per byte, mean of the last 50 steps.
    held_out_bits, gzip_bits, xz_bits : float
        Bits per byte on the held-out text: the model, ``gzip -9``, ``xz -9e`` over all files in one stream.
    held_out_files, held_out_bytes : int
        Size of the held-out text.
    balance : tuple of float
        Per layer, tokens of the busiest expert over the mean, on the held-out text.
    """

    path: str
    parameters: int
    active_parameters: int
    steps: int
    tokens: int
    session_steps: int
    wall_s: float
    cpu_s: float
    tokens_per_s: float
    train_bits: float
    held_out_bits: float
    gzip_bits: float
    xz_bits: float
    held_out_files: int
    held_out_bytes: int
    balance: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str) -> Summary:
        """Read what `to_dict` wrote; other fields are an `OperatorError` that names ``source``."""
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            raise OperatorError(f"{source}: summary: expected the fields {sorted(names)}, got {sorted(data)}")
        return cls(**{**data, "balance": tuple(data["balance"])})
