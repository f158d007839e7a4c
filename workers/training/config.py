"""What is trained and how, as frozen values that are checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args

from ...errors import OperatorError

Schedule = Literal["cosine", "linear", "wsd"]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of an OLMoE-architecture decoder.

    Parameters
    ----------
    layers, hidden, heads, kv_heads : int
        Decoder layers, width of the residual stream, query heads, key/value heads.
    experts, top_k, expert_hidden : int
        Experts of one layer, experts of one token, inner width of one expert.
    max_positions : int
        Longest context the checkpoint declares.
    norm_topk : bool
        Rescale the chosen experts' probabilities to sum to 1 (``norm_topk_prob``).

    Raises
    ------
    OperatorError
        A size is not positive or sizes do not fit each other.
    """

    layers: int = 3
    hidden: int = 128
    heads: int = 2
    kv_heads: int = 2
    experts: int = 8
    top_k: int = 2
    expert_hidden: int = 192
    max_positions: int = 2048
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5
    norm_topk: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "experts", "top_k", "expert_hidden", "max_positions"):
            _at_least(name, getattr(self, name), 1)
        if self.hidden % (2 * self.heads):
            raise OperatorError(f"hidden: {self.hidden} must be a multiple of 2 x heads ({self.heads})")
        if self.heads % self.kv_heads:
            raise OperatorError(f"kv_heads: {self.kv_heads} must divide heads ({self.heads})")
        if self.top_k > self.experts:
            raise OperatorError(f"top_k: {self.top_k} must be at most experts ({self.experts})")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Recipe:
    """Steps, batches and the optimizer's settings.

    Parameters
    ----------
    steps : int
        Optimizer steps of the whole run.
    batch_tokens : int
        Bytes that one step predicts; a multiple of ``seq_len``.
    seq_len : int
        Longest training sequence.
    short_len, growth : int, float
        Sequences begin at ``short_len`` and double, in equal phases, over the first ``growth`` of the steps: short
        ones are cheaper, and are learnt from faster early on.
    lr, vocabulary_lr : float
        Peak learning rates: of the layers, and of the embedding and the output matrix, whose best one is larger.
    warmup, schedule : float, str
        Fraction of the steps spent rising to the peak, and the shape of the way down.
    weight_decay, beta1, beta2, grad_clip : float
        AdamW's settings; the gradient's global norm is clipped to ``grad_clip``.
    balance_loss, z_loss : float
        Weights of the load-balancing and the router z-loss.
    """

    steps: int = 2500
    batch_tokens: int = 1024
    seq_len: int = 1024
    short_len: int = 16
    growth: float = 0.9
    lr: float = 2e-3
    vocabulary_lr: float = 1.2e-2
    warmup: float = 0.05
    schedule: Schedule = "linear"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    balance_loss: float = 0.01
    z_loss: float = 0.001

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "seq_len", "short_len"):
            _at_least(name, getattr(self, name), 1)
        for name in ("growth", "warmup", "beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise OperatorError(f"{name}: {value} must be in [0, 1]")
        for name in ("lr", "vocabulary_lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise OperatorError(f"{name}: {getattr(self, name)} must be above 0")
        if self.schedule not in get_args(Schedule):
            raise OperatorError(f"schedule: {self.schedule!r} is none of {', '.join(get_args(Schedule))}")
        if self.seq_len % self.short_len or self.phases[-1][1] != self.seq_len:
            raise OperatorError(f"seq_len: {self.seq_len} must be short_len ({self.short_len}) times a power of 2")
        if self.batch_tokens % self.seq_len:
            raise OperatorError(f"batch_tokens: {self.batch_tokens} must be a multiple of seq_len ({self.seq_len})")

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """(first step, sequence length) of every phase, in order."""
        doublings = max(0, (self.seq_len // self.short_len).bit_length() - 1)
        return tuple(
            (round(self.steps * self.growth * i / max(doublings, 1)), self.short_len * 2**i)
            for i in range(doublings + 1)
        )

    def phase_at(self, step: int) -> tuple[int, int]:
        """(first step, sequence length) of the phase that ``step`` is in."""
        return [phase for phase in self.phases if phase[0] <= step][-1]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's numbers; equal values give equal weights on equal machines."""

    model: ModelShape = field(default_factory=ModelShape)
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise OperatorError(f"seed: {self.seed} must be in [0, 2**63)")
        if self.recipe.seq_len > self.model.max_positions:
            raise OperatorError(
                f"seq_len: {self.recipe.seq_len} must be at most max_positions ({self.model.max_positions})"
            )

    def with_steps(self, steps: int) -> TrainConfig:
        """The same but for the number of steps."""
        return replace(self, recipe=replace(self.recipe, steps=steps))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str) -> TrainConfig:
        """Read what `to_dict` wrote; an unknown or missing field is an `OperatorError` that names ``source``."""
        model, recipe = _record(ModelShape, data.get("model"), source), _record(Recipe, data.get("recipe"), source)
        if not isinstance(data.get("seed"), int):
            raise OperatorError(f"{source}: seed: expected an integer, got {data.get('seed')!r}")
        return cls(model, recipe, data["seed"])

    def differences(self, other: TrainConfig) -> list[str]:
        """Fields in which two configurations differ, as ``name: mine -> other's``."""
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        return [f"{k}: {v} -> {theirs[k]}" for k, v in mine.items() if theirs[k] != v]


R = TypeVar("R", ModelShape, Recipe)


def _record(kind: type[R], data: object, source: str) -> R:
    names = {f.name for f in fields(kind)}
    if not isinstance(data, Mapping) or set(data) != names:
        raise OperatorError(f"{source}: expected the fields {sorted(names)} for {kind.__name__}, got {data!r}")
    return kind(**data)


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        out.update(value if isinstance(value, Mapping) else {key: value})
    return out


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise OperatorError(f"{name}: {value} must be at least {least}")
