"""Bits per byte on held-out text, overall and by position in the context."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Evaluation", "evaluate", "octaves", "window_starts"]


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of held-out text.

    Attributes:
        bits: Mean bits per token over all positions.
        positions: (lo, hi, bits): the mean over predictions that see between lo + 1 and hi tokens, in octaves.
        tokens: Number of predictions in the mean.
        windows: Bits per token of each window, in the order of the text; ``bits`` is their mean.
    """

    bits: float
    positions: list[tuple[int, int, float]]
    tokens: int
    windows: tuple[float, ...]


def octaves(context: int, first: int = 64) -> list[tuple[int, int]]:
    """Ranges 0..64, 64..128, 128..256 and so on that cover ``range(context)``; the last one may be shorter."""
    ranges = []
    low, high = 0, first
    while low < context:
        ranges.append((low, min(high, context)))
        low, high = high, 2 * high
    return ranges


def window_starts(
    length: int, context: int, max_tokens: int, batch: int, least: int, most: int | None
) -> npt.NDArray[np.int64]:
    """Where the windows of ``context + 1`` bytes begin that are read of ``length`` bytes; see :func:`evaluate`."""
    if context < 1 or batch < 1 or max_tokens < 1:
        raise ValueError(f"context, batch and max_tokens must be at least 1, got {context}, {batch}, {max_tokens}")
    if length < context + 1:
        raise ValueError(
            f"the held-out text has {length:,} bytes, context {context:,} needs at least {context + 1:,}: "
            "give more text or a shorter context"
        )
    if least < 1 or (most is not None and most < least):
        raise ValueError(f"least must be at least 1 and most not below it, got {least} and {most}")
    possible = (length - 1) // context
    count = min(max(max_tokens // context, least), possible if most is None else min(most, possible))
    return np.linspace(0, length - context - 1, count).astype(np.int64)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    valid: npt.NDArray[np.uint8],
    context: int,
    max_tokens: int = 131072,
    batch: int = 1,
    *,
    least: int = 1,
    most: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a model on windows spread evenly over held-out bytes: the same windows for every model.

    The windows depend on the text's length, ``context``, ``max_tokens``, ``least`` and ``most`` only.

    Args:
        model: Maps tokens [B, N] int64 to logits [B, N, vocab]. Put into evaluation mode meanwhile.
        valid: Held-out bytes, one-dimensional, longer than ``context``.
        context: Length of a window.
        max_tokens: Predictions to make at most; ``least`` windows are read all the same.
        batch: Windows at once.
        least: Windows to read at least, where the text has as many.
        most: Windows to read at most; None for no such limit.
        on_window: Called with (windows done, windows in all) before the first window and after each batch. What it
            raises ends the evaluation.

    Returns:
        Bits per byte. Windows do not overlap as long as the text is long enough for ``max_tokens``.

    Raises:
        ValueError: If the text is shorter than ``context + 1``.
    """
    starts = window_starts(len(valid), context, max_tokens, batch, least, most)
    count = len(starts)
    device = next(model.parameters()).device
    by_position = torch.zeros(context, dtype=torch.float64)
    by_window: list[float] = []
    training = model.training
    model.eval()
    try:
        if on_window is not None:
            on_window(0, count)
        for first in range(0, count, batch):
            windows = np.stack([valid[start : start + context + 1] for start in starts[first : first + batch]])
            tokens = torch.from_numpy(windows.astype(np.int64)).to(device)
            logits = model(tokens[:, :-1])
            nats = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            rows = nats.view(len(windows), context).double().cpu()
            by_position += rows.sum(0)
            by_window += (rows.mean(1) / math.log(2)).tolist()
            if on_window is not None:
                on_window(len(by_window), count)
    finally:
        model.train(training)
    bits = by_position / (count * math.log(2))
    positions = [(low, high, bits[low:high].mean().item()) for low, high in octaves(context)]
    return Evaluation(bits.mean().item(), positions, count * context, tuple(by_window))
