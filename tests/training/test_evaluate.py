from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from farfield.training.evaluate import evaluate, octaves


class ByPosition(nn.Module):
    """Knows the next byte of a counting text to 2 bits at positions below 64, and exactly from there on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.windows: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        assert not self.training
        self.windows.extend(tokens[:, 0].tolist())
        following = (tokens + 1) % 256
        logits = torch.full((*tokens.shape, 256), -1e4)
        logits.scatter_(-1, following[..., None], 0.0)
        others = (following[:, :64, None] + torch.tensor([1, 2, 3])) % 256
        logits[:, :64].scatter_(-1, others, 0.0)
        return logits


COUNTING = (np.arange(5000) % 256).astype(np.uint8)


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (1, [(0, 1)]),
        (64, [(0, 64)]),
        (65, [(0, 64), (64, 65)]),
        (512, [(0, 64), (64, 128), (128, 256), (256, 512)]),
        (300, [(0, 64), (64, 128), (128, 256), (256, 300)]),
    ],
)
def test_octaves_cover_the_context(context: int, expected: list[tuple[int, int]]) -> None:
    assert octaves(context) == expected


@pytest.mark.parametrize("batch", [1, 3])
def test_bits_by_position(batch: int) -> None:
    model = ByPosition().train()
    result = evaluate(model, COUNTING, context=256, max_tokens=256 * 7, batch=batch)
    assert result.tokens == 256 * 7
    assert result.positions == [
        (0, 64, pytest.approx(2.0)),
        (64, 128, pytest.approx(0.0)),
        (128, 256, pytest.approx(0.0)),
    ]
    assert result.bits == pytest.approx(2.0 * 64 / 256)
    assert model.training


def test_windows_spread_from_the_first_byte_to_the_last() -> None:
    model = ByPosition()
    evaluate(model, COUNTING, context=100, max_tokens=500)
    assert model.windows[0] == COUNTING[0]
    assert model.windows[-1] == COUNTING[5000 - 101]
    assert len(model.windows) == 5


def test_at_least_one_window_and_never_more_than_fit() -> None:
    assert evaluate(ByPosition(), COUNTING[:101], context=100, max_tokens=1).tokens == 100
    assert evaluate(ByPosition(), COUNTING[:350], context=100).tokens == 300


def test_a_short_text_is_refused() -> None:
    with pytest.raises(ValueError, match="has 100 bytes, context 100 needs at least 101"):
        evaluate(ByPosition(), COUNTING[:100], context=100)
    with pytest.raises(ValueError, match="at least 1, got 100, 0"):
        evaluate(ByPosition(), COUNTING, context=100, batch=0)


def test_windows_come_one_by_one_between_their_limits() -> None:
    told: list[tuple[int, int]] = []
    few = evaluate(ByPosition(), COUNTING, 256, 256, least=3, most=5, on_window=lambda *at: told.append(at))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert few.windows == pytest.approx([0.5] * 3)
    assert len(evaluate(ByPosition(), COUNTING, 256, 256 * 12, least=3, most=5).windows) == 5
    with pytest.raises(ValueError, match="least must be at least 1"):
        evaluate(ByPosition(), COUNTING, 256, least=3, most=2)
