"""What reads the feature maps: one answer per image, or one per pixel through a small pyramid decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farfield.models.vision.backbone import Features, Norm, convolution, hide, resized, sampled
from farfield.models.vision.config import VisionConfig

__all__ = ["Classifier", "Decoder", "Operator", "Segmenter"]


class Classifier(nn.Module):
    """The mean of the coarsest map over the tokens that count, and a linear map to classes."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.out = nn.Linear(config.widths[-1], config.outputs)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: list[Features], x: Tensor) -> Tensor:
        """Logits `[B, classes]`."""
        last = features[-1]
        total = last.map.flatten(2).sum(2)
        if last.mask is None:
            mean = total / last.map[0, 0].numel()
        else:
            mean = total / last.mask.flatten(1).sum(1, keepdim=True).clamp(min=1)
        logits: Tensor = self.out(mean)
        return logits


class Decoder(nn.Module):
    """A feature pyramid (Lin et al., arXiv 1612.03144), light: lateral linear maps, sums from coarse to fine.

    One convolution at the finest level takes the place of the published one per level.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.decoder
        self.laterals = nn.ModuleList(nn.Linear(w, width) for w in config.widths)
        self.mix = convolution(config.dims, width, width, 3, padding=1)
        self.norm = Norm(width)

    def forward(self, features: list[Features]) -> Tensor:
        """`[B, decoder, *grid]` on the grid of the first stage."""
        merged: Tensor | None = None
        for lateral, stage in zip(reversed(self.laterals), reversed(features), strict=True):
            here = hide(lateral(stage.map.movedim(1, -1)).movedim(-1, 1), stage.mask)
            merged = here if merged is None else here + resized(merged, tuple(here.shape[2:]))
        assert merged is not None
        merged = hide(merged, features[0].mask)
        out: Tensor = F.silu(self.norm(self.mix(merged)))
        return out


class Segmenter(nn.Module):
    """The decoder, and a linear map to classes, interpolated to the pixels of the input."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config)
        self.out = nn.Linear(config.decoder, config.outputs)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: list[Features], x: Tensor) -> Tensor:
        """Logits `[B, classes, *grid of x]`."""
        logits = self.out(self.decoder(features).movedim(1, -1)).movedim(-1, 1)
        return resized(logits, tuple(x.shape[2:]))


class Operator(nn.Module):
    """The decoder, interpolated to the points of the input, and a small MLP that sees the input there as well.

    It begins near zero, so a fresh model predicts the mean of the targets. No weight belongs to a place or a size.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config)
        self.interpolated = resized if config.latent is None else sampled
        self.up = nn.Linear(config.decoder + config.channels, 2 * config.decoder)
        self.out = nn.Linear(2 * config.decoder, config.outputs)
        nn.init.normal_(self.out.weight, std=0.002)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: list[Features], x: Tensor) -> Tensor:
        """`[B, outputs, *grid of x]`, in units of the targets' standard deviation."""
        decoded = self.interpolated(self.decoder(features), tuple(x.shape[2:]))
        joined = torch.cat((decoded, x), 1).movedim(1, -1)
        out: Tensor = self.out(F.silu(self.up(joined)))
        return out.movedim(-1, 1)
