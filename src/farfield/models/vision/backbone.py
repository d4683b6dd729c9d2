"""The backbone: a stem that makes tokens of pixels, and stages of blocks over ever coarser grids.

Feature maps are `[B, C, *grid]` between stages and tokens `[B, N, C]`, row-major, inside them. Sizes need not divide by
anything: a stem or a step to the next stage fills up the last patch of an axis with zeros. Pixels that are masked out
are zeros too, and a token without any pixel that counts is hidden from the attention of all others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from farfield import recipes
from farfield.models.seeding import seeded
from farfield.models.vision.config import VisionConfig

__all__ = ["Backbone", "Features", "sampled"]


@dataclass(frozen=True)
class Features:
    """What one stage gives.

    Attributes:
        map: `[B, C, *grid]`.
        mask: bool `[B, *grid]`, True where a token holds a pixel that counts; None when all do.
    """

    map: Tensor
    mask: Tensor | None


class Backbone(nn.Module):
    """Stem and stages.

    Everything but the attention is the same for every recipe, and begins from the same numbers: each part draws its
    initial parameters from its own stream, seeded by ``seed`` and the part's place.

    Args:
        config: the architecture.
        seed: of the initial parameters.

    Attributes:
        checkpointing: whether gradients compute every block again instead of keeping what it held. Off at first.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        residual_std = 0.02 / math.sqrt(2 * sum(config.depths))
        for name, values, fill in (("mean", config.mean, 0.0), ("std", config.std, 1.0)):
            self.register_buffer(name, torch.tensor(values or (fill,) * config.channels), persistent=False)
        with seeded(seed, 0):
            self.stem = (_ConvStem if config.stem == "conv" else _PatchStem)(config)
            self.place = _place(config)
        steps, stages, layer = [], [], 0
        for number, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            blocks = []
            for _ in range(depth):
                with seeded(seed, 1 + layer):
                    blocks.append(_Block(config, number, layer, residual_std))
                layer += 1
            stages.append(nn.ModuleList(blocks))
            if number:
                with seeded(seed, 1_000 + number):
                    steps.append(_Step(config, config.widths[number - 1], width))
        self.stages = nn.ModuleList(stages)
        self.steps = nn.ModuleList(steps)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in config.widths)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> list[Features]:
        """Feature maps of all stages, fine to coarse.

        Args:
            x: `[B, channels, *grid]` of any size of at least one pixel.
            mask: bool `[B, *grid]`, True = the pixel counts. Others may hold anything, NaN included: it is not read.

        Raises:
            ValueError: when shapes do not fit; the message repeats what was given.
        """
        x = self.normalised(x, mask)
        tokens = self.stem(x, mask)
        mask = None if mask is None else _coarser(mask, self.config.patches)
        result = []
        for number, (blocks, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            assert isinstance(blocks, nn.ModuleList)
            if number:
                tokens = self.steps[number - 1](tokens, mask)
                mask = None if mask is None else _coarser(mask, self.config.strides)
            elif self.place is not None:
                tokens = self.place(tokens)
            tokens = hide(tokens, mask)
            grid = tuple(tokens.shape[2:])
            flat = tokens.flatten(2).transpose(1, 2)
            keys = None if mask is None else mask.flatten(1)
            for block in blocks:
                if self.checkpointing and torch.is_grad_enabled():
                    flat = checkpoint(block, flat, grid, keys, use_reentrant=False)
                else:
                    flat = block(flat, grid, keys)
            # Hidden tokens hold nothing that a convolution could carry to their neighbours.
            tokens = hide(flat.transpose(1, 2).unflatten(2, grid), mask)
            normed = norm(flat).transpose(1, 2).unflatten(2, grid)
            result.append(Features(hide(normed, mask), mask))
        return result

    def normalised(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The input, checked and normalised per channel, with zeros where the mask is False."""
        config = self.config
        if x.ndim != 2 + config.dims or x.shape[1] != config.channels or 0 in x.shape:
            axes = ("H, W", "T, H, W")[config.dims - 2]
            raise ValueError(f"x must be [B, {config.channels}, {axes}] without an empty axis, got {tuple(x.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (x.shape[0], *x.shape[2:])):
            raise ValueError(
                f"mask must be a bool tensor of shape {(x.shape[0], *x.shape[2:])} (True = the pixel counts), got "
                f"{mask.dtype} {tuple(mask.shape)}"
            )
        shape = (-1, *(1,) * config.dims)
        return hide((x - self.mean.view(shape)) / self.std.view(shape), mask)


def hide(x: Tensor, mask: Tensor | None) -> Tensor:
    """`[B, C, *grid]` with zeros where the mask `[B, *grid]` is False."""
    return x if mask is None else torch.where(mask[:, None], x, torch.zeros_like(x))


def _coarser(mask: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Bool `[B, *grid]` whether any pixel of a patch counts."""
    for axis, step in enumerate(stride, 1):
        spare = -mask.shape[axis] % step
        if spare:
            shape = list(mask.shape)
            shape[axis] = spare
            mask = torch.cat((mask, mask.new_zeros(shape)), axis)
        mask = mask.unflatten(axis, (-1, step)).any(axis + 1)
    return mask


def convolution(dims: int, *arguments: int, **settings: object) -> nn.Module:
    """`nn.Conv2d` or `nn.Conv3d`."""
    kind = nn.Conv2d if dims == 2 else nn.Conv3d
    return kind(*arguments, **settings)  # type: ignore[arg-type]


class Norm(nn.Module):
    """A LayerNorm over the channels of a map `[B, C, *grid]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """The map, normalised."""
        normed: Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return normed


class _Patches(nn.Module):
    """Patches that do not overlap, one linear map each; the last of an axis is filled up with zeros."""

    def __init__(self, dims: int, before: int, after: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.stride = stride
        self.map = nn.Linear(before * math.prod(stride), after)

    def forward(self, x: Tensor) -> Tensor:
        spare = [-n % s for n, s in zip(x.shape[2:], self.stride, strict=True)]
        if any(spare):
            x = F.pad(x, [value for count in reversed(spare) for value in (0, count)])
        for axis, step in enumerate(self.stride):
            x = x.unflatten(2 + 2 * axis, (-1, step))
        axes = len(self.stride)
        order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]
        mapped: Tensor = self.map(x.permute(order).flatten(1 + axes))
        return mapped.movedim(-1, 1)


class _PatchStem(_Patches):
    """One linear map per patch of pixels."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config.dims, config.channels, config.widths[0], config.patches)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class _ConvStem(nn.Module):
    """Overlapping convolutions of stride 2: they train faster than patches do (Xiao et al., arXiv 2106.14881)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        halvings = max(max(p.bit_length() - 1 for p in config.patches), 1)
        before, left = config.channels, config.patches
        convolutions, norms = [], []
        self.strides: list[tuple[int, ...]] = []
        for number in range(halvings):
            after = max(config.widths[0] // 2 ** (halvings - 1 - number), 8)
            stride = tuple(2 if p > 1 else 1 for p in left)
            convolutions.append(convolution(config.dims, before, after, 3, stride=stride, padding=1))
            norms.append(Norm(after))
            self.strides.append(stride)
            left, before = tuple(max(p // 2, 1) for p in left), after
        self.convolutions, self.norms = nn.ModuleList(convolutions), nn.ModuleList(norms)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for number, (conv, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            if number:
                x = F.silu(x)
            mask = None if mask is None else _coarser(mask, self.strides[number])
            x = hide(norm(conv(x)), mask)  # a bias at hidden pixels must not reach their neighbours either
        return x


class _Step(nn.Module):
    """From one stage to the next: a norm, and patches of tokens that become one."""

    def __init__(self, config: VisionConfig, before: int, after: int) -> None:
        super().__init__()
        self.norm = Norm(before)
        self.patches = _Patches(config.dims, before, after, config.strides)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        merged: Tensor = self.patches(hide(self.norm(x), mask))
        return merged


class _Block(nn.Module):
    """Attention, then an MLP, each on the normalised stream and added back to it."""

    def __init__(self, config: VisionConfig, stage: int, layer: int, residual_std: float) -> None:
        super().__init__()
        width = config.widths[stage]
        hidden = round(width * config.mlp_ratio)
        self.place: nn.Module | None = None
        if config.position == "conv":
            # Conditional position encoding (Chu et al., arXiv 2102.10882): borders and neighbours tell the place.
            self.place = convolution(config.dims, width, width, 3, padding=1, groups=width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        nn.init.normal_(self.up.weight, std=0.02)
        nn.init.normal_(self.down.weight, std=residual_std)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)
        self.attention_norm = nn.LayerNorm(width)
        # Last, because recipes draw different amounts of random numbers and the rest must not depend on that.
        self.attention = recipes.build(
            config.attentions[stage],
            width,
            width // config.head_dim,
            layer=layer,
            dims=config.dims,
            qkv_bias=True,
            proj_bias=True,
            **config.stage_options[stage],
        )

    def forward(self, x: Tensor, grid: tuple[int, ...], keys: Tensor | None) -> Tensor:
        if self.place is not None:
            shaped = x if keys is None else torch.where(keys[..., None], x, torch.zeros_like(x))
            local = self.place(shaped.transpose(1, 2).unflatten(2, grid))
            x = x + local.flatten(2).transpose(1, 2)
        x = x + self.attention(self.attention_norm(x), grid=grid, key_mask=keys)
        return x + self.down(F.silu(self.up(self.mlp_norm(x))))


def _place(config: VisionConfig) -> nn.Module | None:
    if config.position == "waves":
        return _Waves(config.dims, config.widths[0])
    return _Table(config.tables, config.widths[0]) if config.position == "table" else None


class _Waves(nn.Module):
    """Sines and cosines of the place relative to the whole grid, mixed into the tokens: the same at any resolution."""

    def __init__(self, dims: int, width: int, octaves: int = 4) -> None:
        super().__init__()
        self.octaves = octaves
        self.map = nn.Linear(2 * octaves * dims, width)

    def forward(self, x: Tensor) -> Tensor:
        scales = math.pi * 2.0 ** torch.arange(self.octaves, dtype=x.dtype, device=x.device)
        waves = []
        for axis, n in enumerate(x.shape[2:]):
            places = (torch.arange(n, dtype=x.dtype, device=x.device) + 0.5) / n
            angles = places[:, None] * scales
            shape = [n if a == axis else 1 for a in range(x.ndim - 2)] + [2 * self.octaves]
            waves.append(torch.cat((angles.sin(), angles.cos()), -1).view(shape).expand(*x.shape[2:], -1))
        placed: Tensor = x + self.map(torch.cat(waves, -1)).movedim(-1, 0)
        return placed


class _Table(nn.Module):
    """A learned vector per place, interpolated linearly where the grid has another size."""

    def __init__(self, sides: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, width, *sides))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + resized(self.table, tuple(x.shape[2:]))


def sampled(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """`[B, C, *grid]` at the points of another grid, linearly; point k of n lies at k/n of its axis.

    So every second point of a finer grid is a point of the coarse one, as fields that are thinned out have it. Behind
    the last point the value stays what it is there. Cost: B C N times the side of the input per axis, a small matrix.
    """
    for axis, n in enumerate(grid, 2):
        have = x.shape[axis]
        if have == n:
            continue
        place = (torch.arange(n, dtype=x.dtype, device=x.device) * (have / n)).clamp(max=have - 1)
        weights = 1 - (place[:, None] - torch.arange(have, dtype=x.dtype, device=x.device)).abs()
        x = (x.movedim(axis, -1) @ weights.clamp(min=0).T).movedim(-1, axis)
    return x


def resized(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """`[B, C, *grid]` interpolated linearly to another grid."""
    if tuple(x.shape[2:]) == tuple(grid):
        return x
    return F.interpolate(x, size=grid, mode="bilinear" if len(grid) == 2 else "trilinear", align_corners=False)
