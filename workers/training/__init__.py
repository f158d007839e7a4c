"""The trainer: one process, AdamW, a byte-level OLMoE-architecture model, a Hugging Face checkpoint at the end.

What a step computes is a function of the weights, the seed and the step's number. Here are the model, data, schedule,
training state, evaluation and export; never Ray, terminals or argument parsing.
"""

from .config import ModelShape, Recipe, TrainConfig
from .loop import RunOptions, train
from .report import Progress, Summary, TrainingStopped

__all__ = ["ModelShape", "Progress", "Recipe", "RunOptions", "Summary", "TrainConfig", "TrainingStopped", "train"]
