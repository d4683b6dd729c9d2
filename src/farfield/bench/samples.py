"""A few held-out examples with what a trained model makes of them, and from where: what the report draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from farfield.data.examples import BadExample, Source, collate
from farfield.models.vision.model import Examples, VisionModel

__all__ = ["SAMPLES", "Samples", "reach", "sample"]

SAMPLES = 4
"""Examples that are drawn."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Samples:
    """Examples and predictions, for `S` samples.

    Attributes:
        x: float32 `[S, channels, *grid]`.
        y: int64 `[S]` or `[S, *grid]`, or float32 `[S, outputs, *grid]`, the first axis shorter where the model answers
            at leading steps alone.
        mask: bool `[S, *grid]`, True = the point counts.
        predicted: as y.
        confidence: float32 `[S]`, the probability of the predicted class; 1 for other tasks.
        reach: float32 `[S, *grid]`, how strongly the answer at ``query`` depends on each pixel; the largest is 1.
        query: int64 `[axes]`, a point of the grid; -1 on every axis where the answer is one for the whole image.
    """

    x: Floats
    y: npt.NDArray[Any]
    mask: npt.NDArray[np.bool_]
    predicted: npt.NDArray[Any]
    confidence: Floats
    reach: Floats
    query: npt.NDArray[np.int64]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """By name, for a file."""
        return {name: np.asarray(getattr(self, name)) for name in _NAMES}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Samples:
        """The inverse.

        Raises:
            KeyError: when one is missing.
        """
        return cls(**{name: arrays[name] for name in _NAMES})


_NAMES = ("x", "y", "mask", "predicted", "confidence", "reach", "query")


def sample(model: VisionModel, source: Source, count: int = SAMPLES) -> Samples:
    """The first readable of evenly spread examples of a source, and what the model says.

    Raises:
        ValueError: when no example can be read.
    """
    found = []
    for index in (int(i) for i in np.linspace(0, len(source) - 1, min(3 * count, len(source)))):
        try:
            found.append(source.get(index))
        except BadExample:
            continue
    found = found[:: max(1, len(found) // count)][:count]
    if not found:
        raise ValueError("there is no held-out example that can be read")
    batch = collate(found)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            moved = batch.to(device)
            out = model(moved.x, moved.mask).float().cpu()
        place, strength = reach(model, batch)
    finally:
        model.train(training)
    confidence = torch.ones(len(out))
    predicted = out
    if model.config.task != "operator":
        predicted = out.argmax(1)
        if out.ndim == 2:
            confidence = out.softmax(1).max(1).values
    full = torch.ones(len(out), *batch.x.shape[2:], dtype=torch.bool)
    return Samples(
        batch.x.numpy(), batch.y.numpy(), (full if batch.mask is None else batch.mask).numpy(), predicted.numpy(),
        confidence.numpy(), strength, place,
    )  # fmt: skip


def reach(model: VisionModel, batch: Examples) -> tuple[npt.NDArray[np.int64], Floats]:
    """How strongly an answer depends on each pixel: the norm over channels of its gradient by the (normalised) input.

    The answer is the largest logit of an image, or the largest logit (of an operator: all outputs) at the point in the
    upper left third of the grid, or at the counting point that is nearest to it.

    Returns:
        The point, `[axes]` (-1 for none), and `[B, *grid]`, per example relative to its largest.
    """
    device = next(model.parameters()).device
    x = batch.x.to(device).clone().requires_grad_(True)
    out = model(x, None if batch.mask is None else batch.mask.to(device))
    grid = tuple(batch.x.shape[2:])
    if model.config.task == "classify":
        place = np.full(len(grid), -1, dtype=np.int64)
        answer = out.max(1).values
    else:
        steps = out.shape[2]  # of an operator with ``ahead`` fewer than the input has
        place = _query(tuple(out.shape[2:]), None if batch.mask is None else batch.mask[:, :steps])
        at = out[(slice(None), slice(None), *(int(p) for p in place))]
        answer = at.max(1).values if model.config.task == "segment" else at.sum(1)
    (gradient,) = torch.autograd.grad(answer.sum(), x)
    scaled = gradient * model.backbone.std.view(-1, *(1,) * len(grid))
    strength = scaled.norm(dim=1).float().cpu()
    top = strength.flatten(1).max(1).values.clamp(min=torch.finfo(torch.float32).tiny)
    return place, (strength / top.view(-1, *(1,) * len(grid))).numpy()


def _query(grid: tuple[int, ...], mask: torch.Tensor | None) -> npt.NDArray[np.int64]:
    wanted = np.array([n // 3 for n in grid])
    if mask is None:
        return wanted.astype(np.int64)
    places = np.argwhere(mask.all(0).numpy())
    if len(places) == 0:
        return wanted.astype(np.int64)
    return np.asarray(places[np.abs(places - wanted).sum(1).argmin()], dtype=np.int64)
