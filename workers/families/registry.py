"""The families there are, by the first entry of a checkpoint's ``architectures``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import OperatorError
from . import deepseek_v3, mixtral, olmoe, qwen3_moe
from .base import Family, ModelConfig
from .reader import ConfigReader

_MODULES = (mixtral, olmoe, qwen3_moe, deepseek_v3)
SUPPORTED: Mapping[str, Family] = MappingProxyType({m.FAMILY.architecture: m.FAMILY for m in _MODULES})


def load_config(checkpoint: str | Path) -> ModelConfig:
    """Read ``config.json`` of the checkpoint folder, and what ends a sequence from ``generation_config.json`` too.

    Raises
    ------
    OperatorError
        The first is missing, one is no JSON object, the architecture is not supported, or a field is missing or
        malformed.
    """
    config = _read(ConfigReader.from_file(Path(checkpoint) / "config.json"))
    generation = Path(checkpoint) / "generation_config.json"
    if not generation.exists():
        return config
    reader = ConfigReader.from_file(generation)
    eos_ids = reader.integers("eos_token_id")
    if any(token >= config.vocab_size for token in eos_ids):
        raise reader.fail("eos_token_id", f"ids below vocab_size, which is {config.vocab_size}")
    return replace(config, eos_ids=tuple(dict.fromkeys(config.eos_ids + eos_ids)))


def read_config(data: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """The same from a parsed object; errors begin with ``source``."""
    return _read(ConfigReader(data, source))


def _read(reader: ConfigReader) -> ModelConfig:
    names = reader.get("architectures")
    if not isinstance(names, list) or names[:1] not in [[name] for name in SUPPORTED]:
        raise reader.fail("architectures", f"a list that begins with one of {', '.join(SUPPORTED)}")
    return SUPPORTED[names[0]].read(reader)


def family_of(config: ModelConfig) -> Family:
    """The family that read ``config``."""
    try:
        return SUPPORTED[config.family]
    except KeyError:
        raise OperatorError(f"model family {config.family!r}: expected one of {', '.join(SUPPORTED)}") from None
