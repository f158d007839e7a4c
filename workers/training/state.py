"""Everything a run needs to go on as if it had never stopped: weights, moments, step and losses, in one file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import OperatorError
from .config import TrainConfig
from .files import replace_file
from .model import Decoder
from .optim import make_optimizer

STATE = "training_state.safetensors"


@dataclass
class TrainState:
    """The mutable state of a run.

    Parameters
    ----------
    step : int
        Steps done; also the data position, since a step's rows depend on its number alone.
    bits_per_byte : list of float
        Training loss of every step done.
    """

    model: Decoder
    optimizer: torch.optim.AdamW
    step: int = 0
    bits_per_byte: list[float] = field(default_factory=list)

    @classmethod
    def initial(cls, config: TrainConfig) -> TrainState:
        """Freshly drawn weights; moments exist from the start, all zero."""
        model = Decoder(config.model, torch.Generator().manual_seed(config.seed))
        optimizer = make_optimizer(model, config.recipe)
        for p in model.parameters():
            optimizer.state[p] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        return cls(model, optimizer)

    def tensors(self) -> dict[str, Tensor]:
        """Weights as ``weights.NAME``, moments as ``exp_avg.NAME`` and ``exp_avg_sq.NAME``."""
        named: dict[str, Tensor] = {}
        for name, p in self.model.named_parameters():
            moments = self.optimizer.state[p]
            named |= {
                f"weights.{name}": p.detach(),
                f"exp_avg.{name}": moments["exp_avg"],
                f"exp_avg_sq.{name}": moments["exp_avg_sq"],
            }
        return named

    def save(self, folder: Path) -> None:
        """Replace the state in ``folder`` at once: a crash leaves the old one or the new one."""
        tensors = self.tensors() | {"bits_per_byte": torch.tensor(self.bits_per_byte, dtype=torch.float64)}
        replace_file(folder / STATE, lambda path: save_file(tensors, path))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take over what `save` wrote.

        Raises
        ------
        OperatorError
            The file is truncated or foreign, or a tensor is missing or has another shape.
        """
        path = folder / STATE
        try:
            with safe_open(path, framework="pt") as saved:
                for name, tensor in self.tensors().items():
                    tensor.copy_(_expected(saved.get_tensor(name), tensor, name, path))
                self.bits_per_byte = saved.get_tensor("bits_per_byte").tolist()
        except (OSError, SafetensorError) as e:
            raise OperatorError(f"{path}: cannot be resumed from: {e}; start over with --no-resume") from e
        self.step = len(self.bits_per_byte)
        for moments in self.optimizer.state.values():
            moments["step"].fill_(self.step)


def _expected(saved: Tensor, own: Tensor, name: str, path: Path) -> Tensor:
    if saved.shape != own.shape or saved.dtype != own.dtype:
        raise OperatorError(f"{path}: {name}: {saved.dtype} {[*saved.shape]}, expected {own.dtype} {[*own.shape]}")
    return saved
