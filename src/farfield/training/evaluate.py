"""Bits per byte on held-out text, overall and by position in the context."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Evaluation", "evaluate", "octaves"]


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of held-out text.

    Attributes:
        bits: Mean bits per token over all positions.
        positions: (lo, hi, bits): the mean over predictions that see between lo + 1 and hi tokens, in octaves.
        tokens: Number of predictions in the mean.
    """

    bits: float
    positions: list[tuple[int, int, float]]
    tokens: int


def octaves(context: int, first: int = 64) -> list[tuple[int, int]]:
    """Ranges 0..64, 64..128, 128..256 and so on that cover ``range(context)``; the last one may be shorter."""
    ranges = []
    low, high = 0, first
    while low < context:
        ranges.append((low, min(high, context)))
        low, high = high, 2 * high
    return ranges


@torch.no_grad()
def evaluate(
    model: nn.Module,
    valid: npt.NDArray[np.uint8],
    context: int,
    max_tokens: int = 131072,
    batch: int = 1,
) -> Evaluation:
    """Measure a model on windows spread evenly over held-out bytes: the same windows for every model.

    Args:
        model: Maps tokens [B, N] int64 to logits [B, N, vocab]. Put into evaluation mode meanwhile.
        valid: Held-out bytes, one-dimensional, longer than ``context``.
        context: Length of a window.
        max_tokens: Predictions to make at most; at least one window is read.
        batch: Windows at once.

    Returns:
        Bits per byte. Windows do not overlap as long as the text is long enough for ``max_tokens``.

    Raises:
        ValueError: If the text is shorter than ``context + 1``.
    """
    if context < 1 or batch < 1 or max_tokens < 1:
        raise ValueError(f"context, batch and max_tokens must be at least 1, got {context}, {batch}, {max_tokens}")
    if len(valid) < context + 1:
        raise ValueError(
            f"the held-out text has {len(valid):,} bytes, context {context:,} needs at least {context + 1:,}: "
            "give more text or a shorter context"
        )
    count = max(1, min(max_tokens // context, (len(valid) - 1) // context))
    starts = np.linspace(0, len(valid) - context - 1, count).astype(np.int64)
    device = next(model.parameters()).device
    by_position = torch.zeros(context, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        for first in range(0, count, batch):
            windows = np.stack([valid[start : start + context + 1] for start in starts[first : first + batch]])
            tokens = torch.from_numpy(windows.astype(np.int64)).to(device)
            logits = model(tokens[:, :-1])
            nats = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            by_position += nats.view(len(windows), context).double().sum(0).cpu()
    finally:
        model.train(training)
    bits = by_position / (count * math.log(2))
    positions = [(low, high, bits[low:high].mean().item()) for low, high in octaves(context)]
    return Evaluation(bits.mean().item(), positions, count * context)
