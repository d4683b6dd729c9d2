from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from farfield.models.language import LanguageConfig, LanguageModel
from farfield.training.loop import TrainConfig, Trainer


@pytest.fixture
def text() -> npt.NDArray[np.uint8]:
    """A text with something to learn: words drawn at random."""
    words = np.array(["near ", "far ", "field ", "level ", "group ", "cell "])
    drawn = np.random.default_rng(0).choice(words, 2000)
    return np.frombuffer("".join(drawn).encode(), dtype=np.uint8)


@pytest.fixture
def make_trainer(text: npt.NDArray[np.uint8]) -> Callable[..., Trainer]:
    def make(attention: str = "dense", dim: int = 32, **changes: object) -> Trainer:
        settings = {"context": 64, "steps": 12, **changes}
        model = LanguageModel(LanguageConfig(attention, dim=dim, depth=2, num_heads=2, context=64))
        return Trainer(model, text, TrainConfig(**settings))  # type: ignore[arg-type]

    return make
