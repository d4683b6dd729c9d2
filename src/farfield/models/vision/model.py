"""Backbone and head together, with the loss that trains them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farfield.models.seeding import seeded
from farfield.models.vision.backbone import Backbone, Features, hide, sampled
from farfield.models.vision.config import VisionConfig
from farfield.models.vision.heads import Classifier, Operator, Segmenter

__all__ = ["Examples", "VisionModel", "relative_errors"]

_HEADS: dict[str, type[Classifier | Segmenter | Operator]] = {
    "classify": Classifier,
    "segment": Segmenter,
    "operator": Operator,
}


class Examples(NamedTuple):
    """A batch.

    Attributes:
        x: `[B, channels, *grid]`.
        y: what to predict: int64 `[B]` (classify), int64 `[B, *grid]` (segment), `[B, outputs, *grid]` (operator; of
            one with ``ahead`` the first axis of the grid has that many steps).
        mask: bool `[B, *grid]`, True = the pixel counts; None when all do.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device | str) -> Examples:
        """The batch on another device."""
        return Examples(*(None if t is None else t.to(device) for t in self))  # type: ignore[arg-type]


class VisionModel(nn.Module):
    """A model of images or fields whose attention is a recipe chosen by name, per stage.

    Args:
        config: the architecture.
        seed: of the initial parameters; the global random state is left alone. Everything but the attention begins
            from the same numbers for every recipe.

    Raises:
        ValueError: when the recipe is unknown or does not work in that many dimensions.
        TypeError: when the recipe does not take one of the options.
    """

    target_mean: Tensor
    target_std: Tensor

    def __init__(self, config: VisionConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, seed=seed)
        with seeded(seed, 2_000):
            self.head = _HEADS[config.task](config)
        for name, values, fill in (("mean", config.target_mean, 0.0), ("std", config.target_std, 1.0)):
            self.register_buffer(f"target_{name}", torch.tensor(values or (fill,) * config.outputs), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predicts.

        Args:
            x: `[B, channels, *grid]`, any size.
            mask: bool `[B, *grid]`, True = the pixel counts; what others hold is not read.

        Returns:
            Logits `[B, classes]` (classify) or `[B, classes, *grid]` (segment), or `[B, outputs, *grid]` in the units
            of the targets (operator).
        """
        features = self._features(x, mask)
        out: Tensor = self.head(features, self.backbone.normalised(x, mask))
        if self.config.task != "operator":
            return out
        shape = (-1, *(1,) * self.config.dims)
        base = hide(x, mask)[:, : self.config.outputs] if self.config.residual else self.target_mean.view(shape)
        if self.config.ahead is not None:
            out, base = out[:, :, : self.config.ahead], base[:, :, : self.config.ahead]
        return out * self.target_std.view(shape) + base

    def _features(self, x: Tensor, mask: Tensor | None) -> list[Features]:
        grid = self.config.latents
        if grid is None or grid == tuple(x.shape[2:]):
            return self.backbone(x, mask)
        if mask is None:
            return self.backbone(sampled(x, grid), None)
        # A point counts where all points count that it is interpolated between.
        known = sampled(mask[:, None].to(x.dtype), grid)[:, 0] > 1 - 1e-4
        return self.backbone(sampled(hide(x, mask), grid), known)

    def loss(self, batch: Examples) -> Tensor:
        """The loss of a batch: cross-entropy in nats, or the mean relative L2 error of an operator's outputs."""
        predicted = self(batch.x, batch.mask)
        if self.config.task == "operator":
            return relative_errors(predicted, batch.y, batch.mask).mean()
        y = batch.y
        if batch.mask is not None and self.config.task == "segment":
            y = torch.where(batch.mask, y, torch.full_like(y, self.config.ignore))
        if bool((y == self.config.ignore).all()):
            return predicted.sum() * 0.0  # nothing here counts, and a mean over nothing would be NaN
        return F.cross_entropy(predicted, y, ignore_index=self.config.ignore)

    def parameter_count(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())


def relative_errors(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """|predicted - target| / |target| per example: L2 norms over the points that count, a mean over channels.

    Args:
        predicted, target: `[B, C, *grid]`. Targets may hold anything, NaN included, where the mask is False.
        mask: bool `[B, *grid]`; None when every point counts. Where it has more steps on the first axis than the
            target, the leading ones are taken.

    Returns:
        `[B]`. A channel whose target is zero everywhere gives the norm of the prediction itself.

    Raises:
        ValueError: when the shapes differ.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"predicted and target differ in shape: {tuple(predicted.shape)} and {tuple(target.shape)}")
    difference = predicted - target
    if mask is not None:
        hidden = ~mask[:, None, : target.shape[2]]
        difference, target = difference.masked_fill(hidden, 0.0), target.masked_fill(hidden, 0.0)
    size = target.flatten(2).norm(dim=2)
    tiny = math.sqrt(torch.finfo(size.dtype).tiny)
    ratio = difference.flatten(2).norm(dim=2) / torch.where(size > tiny, size, torch.ones_like(size))
    return ratio.mean(1)
