"""How well a vision model does on held-out examples: accuracy, mean IoU, relative L2.

Of every metric there is one number per example besides the whole, so that two models can be compared pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from farfield.models.vision.model import Examples, VisionModel, relative_errors

__all__ = ["METRICS", "Metric", "VisionEvaluation", "evaluate_vision", "iou"]


@dataclass(frozen=True)
class Metric:
    """A number that says how good a model is.

    Attributes:
        name: for tables.
        higher: whether more is better.
        percent: whether it is a share, told in percent.
    """

    name: str
    higher: bool
    percent: bool

    def say(self, value: float) -> str:
        """The value for people: 61.25 % or 0.0312."""
        return f"{100 * value:.2f} %" if self.percent else f"{value:.4f}"


METRICS = {
    "classify": Metric("accuracy", True, True),
    "segment": Metric("mean IoU", True, True),
    "operator": Metric("relative L2", False, False),
}
"""The metric of each task of :data:`farfield.models.vision.TASKS`."""


@dataclass(frozen=True)
class VisionEvaluation:
    """What a model makes of held-out examples.

    Attributes:
        score: accuracy, mean IoU over the classes that occur, or the mean relative L2 error.
        examples: per example: 1 or 0 for right or wrong, the share of pixels that are right, the relative L2 error.
        indices: the number of each of these examples in its source.
        classes: per class its accuracy (classify) or IoU (segment); NaN for a class that occurs nowhere. Empty for an
            operator.
        relative_mse: of an operator, the mean of the squared relative L2 errors; None otherwise.
        pixels: of a segmentation, the share of all pixels that are right; None otherwise.
        counts: of a segmentation, per example the pixels per class that are in both, and in either, of truth and
            prediction: their sums over examples give the IoU. Empty otherwise.
    """

    score: float
    examples: tuple[float, ...]
    indices: tuple[int, ...]
    classes: tuple[float, ...] = ()
    relative_mse: float | None = None
    pixels: float | None = None
    counts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()


@torch.no_grad()
def evaluate_vision(
    model: VisionModel,
    batches: Iterable[tuple[Examples, list[int]]],
    *,
    on_batch: Callable[[int], None] | None = None,
) -> VisionEvaluation:
    """Measures a model on batches with the numbers of their examples.

    Args:
        model: put into evaluation mode meanwhile.
        batches: such as :func:`farfield.data.examples.in_order` gives.
        on_batch: told the number of examples done, before the first batch and after each; what it raises ends the
            evaluation.

    Raises:
        ValueError: when there is no example.
    """
    config = model.config
    device = next(model.parameters()).device
    confusion = torch.zeros(config.outputs, config.outputs, dtype=torch.int64)
    per_example: list[float] = []
    indices: list[int] = []
    counts: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    training = model.training
    model.eval()
    try:
        if on_batch is not None:
            on_batch(0)
        for batch, numbers in batches:
            predicted = model(*_inputs(batch, device)).cpu()
            if config.task == "operator":
                per_example += relative_errors(predicted.double(), batch.y.double(), batch.mask).tolist()
            else:
                labels = predicted.argmax(1)
                counted = batch.y != config.ignore
                if config.task == "segment" and batch.mask is not None:
                    counted &= batch.mask
                confusion += _confusion(labels[counted], batch.y[counted], config.outputs)
                if config.task == "segment":
                    for said, truth, here in zip(labels, batch.y, counted, strict=True):
                        own = _confusion(said[here], truth[here], config.outputs)
                        counts.append((tuple(own.diagonal().tolist()), tuple(_union(own).tolist())))
                right = ((labels == batch.y) & counted).flatten(1) if labels.ndim > 1 else (labels == batch.y)[:, None]
                known = counted.flatten(1) if labels.ndim > 1 else counted[:, None]
                per_example += (right.sum(1).double() / known.sum(1).clamp(min=1)).tolist()
            indices += numbers
            if on_batch is not None:
                on_batch(len(indices))
    finally:
        model.train(training)
    if not indices:
        raise ValueError("there is no held-out example that can be read")
    places = tuple(indices)
    if config.task == "operator":
        errors = torch.tensor(per_example, dtype=torch.float64)
        return VisionEvaluation(
            float(errors.mean()), tuple(per_example), places, relative_mse=float((errors**2).mean())
        )
    hits = confusion.diagonal().double()
    total = max(int(confusion.sum()), 1)
    if config.task == "segment":
        by_class = iou(confusion)
        known_classes = by_class[~by_class.isnan()]
        score = float(known_classes.mean()) if len(known_classes) else math.nan
        return VisionEvaluation(
            score, tuple(per_example), places, tuple(by_class.tolist()), None, float(hits.sum()) / total, tuple(counts)
        )
    recall = hits / confusion.sum(1)  # 0 / 0 is NaN: no such image
    return VisionEvaluation(float(hits.sum()) / total, tuple(per_example), places, tuple(recall.tolist()))


def _inputs(batch: Examples, device: torch.device) -> tuple[Tensor, Tensor | None]:
    moved = batch.to(device)
    return moved.x, moved.mask if batch.y.ndim > 1 else None


def _confusion(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """[classes, classes] how often a target (row) was taken for a class (column)."""
    return torch.bincount(target * classes + predicted, minlength=classes * classes).view(classes, classes)


def iou(confusion: Tensor) -> Tensor:
    """Intersection over union per class, float64, from counts [target, predicted]; NaN for a class without pixels.

    A class that is predicted but never true has an IoU of 0.
    """
    return confusion.diagonal().double() / _union(confusion)


def _union(confusion: Tensor) -> Tensor:
    return confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
