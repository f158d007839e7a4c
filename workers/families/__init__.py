"""What Concertina knows of model families: declarative and free of torch.

Each family is one file that reads a ``config.json`` and names the checkpoint's tensors; `registry` finds it by
architecture, `layout` counts bytes. Nothing here computes with weights.
"""

from .base import GqaAttention, MlaAttention, ModelConfig, Rope, RopeScaling, Router, TensorSpec, TrunkTensor
from .registry import SUPPORTED, family_of, load_config, read_config

__all__ = [
    "SUPPORTED",
    "GqaAttention",
    "MlaAttention",
    "ModelConfig",
    "Rope",
    "RopeScaling",
    "Router",
    "TensorSpec",
    "TrunkTensor",
    "family_of",
    "load_config",
    "read_config",
]
