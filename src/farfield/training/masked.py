"""Masked language modelling on bytes: some bytes are hidden, and predicted from all that stands around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from farfield.models.language import LanguageConfig, LanguageModel
from farfield.training.evaluate import Evaluation, octaves, window_starts
from farfield.training.loop import TextWindows

__all__ = ["MASK", "RATE", "MaskedBatch", "MaskedModel", "MaskedWindows", "evaluate_masked", "hide"]

MASK = 256
"""The token that stands for a hidden byte."""
RATE = 0.15
"""Part of the bytes that is hidden, as in BERT (arXiv 1810.04805); here each of them becomes `MASK`."""


@dataclass(frozen=True)
class MaskedBatch:
    """Text with hidden bytes.

    Attributes:
        tokens: int64 `[B, N]`, bytes and `MASK`.
        hidden: bool `[B, N]`.
        targets: int64 `[B, N]`, the bytes.
    """

    tokens: Tensor
    hidden: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> MaskedBatch:
        """The same on another device."""
        return MaskedBatch(self.tokens.to(device), self.hidden.to(device), self.targets.to(device))


def hide(targets: Tensor, generator: np.random.Generator, rate: float = RATE) -> MaskedBatch:
    """Hides the same number of bytes in every row, at least one, at random places.

    Args:
        targets: int64 `[B, N]`.
        generator: decides the places.
        rate: part of the bytes to hide.
    """
    rows, length = targets.shape
    number = max(1, round(rate * length))
    hidden = torch.zeros(rows, length, dtype=torch.bool)
    hidden.scatter_(1, torch.from_numpy(generator.random((rows, length)).argsort(1)[:, :number].copy()), True)
    return MaskedBatch(targets.masked_fill(hidden, MASK), hidden, targets)


class MaskedWindows:
    """`TextWindows` with hidden bytes; step s depends on (seed, s) only.

    Args:
        train: One-dimensional integer array, not shorter than ``context``.
        context: Bytes of a window, at least 2.
        batch, seed: As in `farfield.training.loop.TrainConfig`.

    Raises:
        ValueError: If the text is shorter than ``context``.
    """

    def __init__(self, train: npt.NDArray[np.uint8], context: int, batch: int, seed: int) -> None:
        self.windows, self.seed = TextWindows(train, context - 1, batch, seed), seed

    def batch(self, step: int) -> MaskedBatch:
        """The batch of one step."""
        # One more number than the windows are drawn by: places do not hang together with where the windows lie.
        return hide(self.windows.batch(step), np.random.default_rng((self.seed, step, 1)))

    def stream(self, first: int) -> Iterator[MaskedBatch]:
        """See `farfield.training.loop.Batches`."""
        return map(self.batch, count(first))


class MaskedModel(LanguageModel):
    """A `LanguageModel` that predicts hidden bytes, from both sides with ``causal=False``.

    Raises:
        ValueError: As `LanguageModel`, and if its vocabulary has no room for `MASK`.
    """

    def __init__(self, config: LanguageConfig, *, seed: int = 0) -> None:
        if config.vocab <= MASK:
            raise ValueError(f"vocab={config.vocab}: masked modelling needs token {MASK} for hidden bytes; {MASK + 1}")
        super().__init__(config, seed=seed)

    def loss(self, batch: MaskedBatch) -> Tensor:  # type: ignore[override]
        """Mean negative log-likelihood of the hidden bytes in nats."""
        logits = self.head(self.features(batch.tokens)[batch.hidden])
        return F.cross_entropy(logits, batch.targets[batch.hidden])


@torch.no_grad()
def evaluate_masked(
    model: MaskedModel,
    valid: npt.NDArray[np.uint8],
    context: int,
    max_tokens: int = 131072,
    *,
    least: int = 1,
    most: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Bits per hidden byte on windows spread evenly over held-out bytes; windows and hidden places are always the same.

    Args:
        model, valid, context, least, most, on_window: as in `farfield.training.evaluate.evaluate`.
        max_tokens: Bytes to read at most, hidden or not; ``least`` windows are read all the same.

    Returns:
        ``bits`` is the mean over hidden bytes, ``tokens`` their number, ``positions`` by place in the window.

    Raises:
        ValueError: If the text is shorter than ``context + 1``.
    """
    starts = window_starts(len(valid), context, max_tokens, 1, least, most)
    device = next(model.parameters()).device
    sums, numbers = np.zeros(context), np.zeros(context)
    by_window: list[float] = []
    training = model.training
    model.eval()
    try:
        if on_window is not None:
            on_window(0, len(starts))
        for number, start in enumerate(starts):
            targets = torch.from_numpy(valid[start : start + context].astype(np.int64))[None]
            batch = hide(targets, np.random.default_rng((0, number, 2))).to(device)
            logits = model.head(model.features(batch.tokens)[batch.hidden])
            bits = F.cross_entropy(logits.float(), batch.targets[batch.hidden], reduction="none").cpu() / math.log(2)
            places = batch.hidden[0].nonzero()[:, 0].cpu().numpy()
            sums[places] += bits.double().numpy()
            numbers[places] += 1
            by_window.append(float(bits.double().mean()))
            if on_window is not None:
                on_window(len(by_window), len(starts))
    finally:
        model.train(training)
    positions = [
        (low, high, float(sums[low:high].sum() / numbers[low:high].sum()))
        for low, high in octaves(context)
        if numbers[low:high].sum()
    ]
    return Evaluation(float(sums.sum() / numbers.sum()), positions, int(numbers.sum()), tuple(by_window))
