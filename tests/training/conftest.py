"""A corpus of a few small files and a run of a few seconds."""

import random
from pathlib import Path

import pytest
from concertina.workers.training.config import ModelShape, Recipe, TrainConfig

WORDS = [*"abcdefghij (),.:=_+", "def", "return", "self", "import", "for", "None", "\n"]


def write_corpus(folder: Path, files: int = 60, seed: int = 0) -> Path:
    """Random text from a small vocabulary; a file in twenty or so is held out by its hash."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        (folder / f"f{i:02}.txt").write_text(" ".join(rng.choices(WORDS, k=200)))
    return folder


@pytest.fixture
def corpus_dir(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "text")


@pytest.fixture
def config() -> TrainConfig:
    model = ModelShape(layers=2, hidden=16, heads=2, kv_heads=1, experts=5, top_k=2, expert_hidden=12, max_positions=64)
    recipe = Recipe(steps=12, batch_tokens=256, seq_len=32, short_len=16, growth=0.5, lr=1e-2)
    return TrainConfig(model, recipe, seed=3)
