"""The numbers that decide a vision model, and its named sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from farfield import recipes
from farfield.geometry import per_axis
from farfield.models.language import tuples

__all__ = ["POSITIONS", "SIZES", "STEMS", "TASKS", "VisionConfig", "preset"]

TASKS = ("classify", "segment", "operator")
"""One label per image; one label per pixel; numbers per point of a grid."""
STEMS = ("conv", "patch")
"""How pixels become tokens: overlapping convolutions of stride 2, or one linear map per patch."""
POSITIONS = ("none", "conv", "waves", "table")
"""Where tokens learn where they are: nowhere; a depthwise convolution before every block (any size); sines and cosines
of the place relative to the whole (any size and resolution); a learned table, interpolated to other sizes."""


@dataclass(frozen=True)
class VisionConfig:
    """Everything that decides the architecture; serialises to JSON by ``dataclasses.asdict``.

    A model with one stage is a plain vision transformer; several stages make a pyramid of feature maps.

    Attributes:
        attention: Name of a recipe, or one name per stage.
        options: Options of that recipe, or one mapping per stage. Lists, as JSON gives them, become tuples.
        task: "classify", "segment" or "operator", see :data:`TASKS`.
        dims: Axes of the grid: 2 for images and fields, 3 for video and volumes.
        channels: Channels of the input.
        outputs: Classes, or channels of the output.
        widths: Channels of each stage.
        depths: Blocks of each stage.
        head_dim: Channels of an attention head; divides every width.
        patch: Pixels of a token of the first stage, per axis or the same on all.
        downsample: Tokens of one stage that become one of the next, per axis or the same on all.
        stem: "conv" or "patch", see :data:`STEMS`.
        position: "none", "conv", "waves" or "table", see :data:`POSITIONS`.
        table: Side of the learned table per axis, for ``position="table"``.
        mlp_ratio: Width of the MLP's hidden layer over that of its stage.
        decoder: Channels of the pyramid decoder of "segment" and "operator".
        mean, std: Subtracted from and divided by every channel of the input; one number per channel, or none for 0, 1.
        target_mean, target_std: The same of the targets of an operator, whose outputs are scaled back.
        residual: An operator's outputs are changes of its first input channels, of as many as there are outputs.
        ahead: An operator answers at the leading ``ahead`` steps of the first of three axes alone; None for all.
        latent: Grid on which the backbone of an operator works, per axis or the same on all, whatever the input's: it
            is sampled there, and the features are interpolated back to every point of the input. None: the input's own.
        ignore: A label that stands for none: such pixels or images count in no loss.
    """

    attention: str | tuple[str, ...] = "fma"
    options: Mapping[str, Any] | tuple[Mapping[str, Any], ...] = field(default_factory=dict)
    task: str = "classify"
    dims: int = 2
    channels: int = 3
    outputs: int = 10
    widths: tuple[int, ...] = (32, 64, 128, 256)
    depths: tuple[int, ...] = (1, 1, 2, 1)
    head_dim: int = 32
    patch: int | tuple[int, ...] = 4
    downsample: int | tuple[int, ...] = 2
    stem: str = "conv"
    position: str = "conv"
    table: int | tuple[int, ...] = 14
    mlp_ratio: float = 4.0
    decoder: int = 64
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()
    residual: bool = False
    ahead: int | None = None
    latent: int | tuple[int, ...] | None = None
    ignore: int = -1

    def __post_init__(self) -> None:
        """Check every setting, so that a wrong one is reported by its own name."""
        sides = ("patch", "downsample", "table", "latent")
        for name in ("options", "attention", "widths", "depths", *sides, *_STATISTICS):
            object.__setattr__(self, name, tuples(getattr(self, name)))
        for name in ("channels", "outputs", "head_dim", "decoder"):
            _positive(name, getattr(self, name))
        if self.dims not in (2, 3):
            raise ValueError(f"dims must be 2 (images, fields) or 3 (video, volumes), got {self.dims!r}")
        for name, allowed in (("task", TASKS), ("stem", STEMS), ("position", POSITIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.widths or len(self.widths) != len(self.depths):
            raise ValueError(f"widths and depths need one number per stage, got {self.widths} and {self.depths}")
        for value in (*self.widths, *self.depths):
            _positive("widths and depths", value)
        for width in self.widths:
            if width % self.head_dim:
                raise ValueError(f"head_dim must divide every width, got head_dim {self.head_dim} and width {width}")
        for name in ("patch", "downsample", "table"):
            per_axis(getattr(self, name), self.dims, name)
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio!r}")
        if self.stem == "conv" and any(p & (p - 1) for p in self.patches):
            raise ValueError(
                f"stem='conv' halves the grid step by step, so patch must be a power of two on every axis, got "
                f"{self.patches}; stem='patch' takes any"
            )
        for name, count in zip(_STATISTICS, (self.channels, self.channels, self.outputs, self.outputs), strict=True):
            given = getattr(self, name)
            if given and len(given) != count:
                raise ValueError(f"{name} needs one number for each of {count} channels, got {len(given)}")
            if name.endswith("std") and any(not value > 0 for value in given):
                raise ValueError(f"{name} must be positive, got {given}")
        if self.residual and (self.task != "operator" or self.channels < self.outputs):
            raise ValueError(
                f"residual=True adds the first input channels to the outputs of an operator: task is {self.task!r}, "
                f"and channels {self.channels} must be at least outputs {self.outputs}"
            )
        if self.ahead is not None:
            _positive("ahead", self.ahead)
            if self.task != "operator" or self.dims != 3:
                raise ValueError(
                    f"ahead={self.ahead} is for an operator with dims=3, not {self.task!r} in {self.dims}-D"
                )
        if self.latent is not None:
            for side in per_axis(self.latent, self.dims, "latent"):
                _positive("latent", side)
            if self.task != "operator":
                raise ValueError(f"latent={self.latent} is for task 'operator', got task {self.task!r}")
        self._check_attention()

    def _check_attention(self) -> None:
        stages = len(self.widths)
        for name, given in (("attention", self.attention), ("options", self.options)):
            if isinstance(given, tuple) and len(given) != stages:
                raise ValueError(f"{name} names {len(given)} stages, the model has {stages}; give one, or one for each")
        for name in self.attentions:
            works = recipes.get(name).dims
            if self.dims not in works:
                said = ", ".join(f"{d}-D" for d in works)
                raise ValueError(f"recipe {name!r} works in {said}; this model has dims={self.dims}")

    @property
    def attentions(self) -> tuple[str, ...]:
        """One name per stage."""
        return self.attention if isinstance(self.attention, tuple) else (self.attention,) * len(self.widths)

    @property
    def stage_options(self) -> tuple[Mapping[str, Any], ...]:
        """One mapping per stage."""
        return self.options if isinstance(self.options, tuple) else (self.options,) * len(self.widths)

    @property
    def patches(self) -> tuple[int, ...]:
        """Pixels of a token of the first stage, per axis."""
        return per_axis(self.patch, self.dims, "patch")

    @property
    def strides(self) -> tuple[int, ...]:
        """Tokens that become one between stages, per axis."""
        return per_axis(self.downsample, self.dims, "downsample")

    @property
    def tables(self) -> tuple[int, ...]:
        """Side of the learned table, per axis."""
        return per_axis(self.table, self.dims, "table")

    @property
    def latents(self) -> tuple[int, ...] | None:
        """Grid of the backbone, per axis; None for the input's."""
        return None if self.latent is None else per_axis(self.latent, self.dims, "latent")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisionConfig:
        """Build from what ``dataclasses.asdict`` gave, for example from JSON.

        Raises:
            ValueError: If a key is unknown, or a value makes no sense.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown model settings {unknown}; accepted are {known}")
        return cls(**values)


_STATISTICS = ("mean", "std", "target_mean", "target_std")

_PYRAMID = {"head_dim": 32}
_PLAIN: dict[str, Any] = {"stem": "patch", "position": "table", "patch": 16}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**_PYRAMID, "widths": (32, 64, 128, 256), "depths": (1, 1, 2, 1), "decoder": 64},
    "small": {**_PYRAMID, "widths": (64, 128, 256, 512), "depths": (2, 2, 4, 2), "decoder": 128},
    "base": {**_PYRAMID, "widths": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "decoder": 256},
    "vit-tiny": {**_PLAIN, "widths": (192,), "depths": (12,), "head_dim": 64, "decoder": 128},
    "vit-small": {**_PLAIN, "widths": (384,), "depths": (12,), "head_dim": 64, "decoder": 256},
    "vit-base": {**_PLAIN, "widths": (768,), "depths": (12,), "head_dim": 64, "decoder": 256},
}
"""Named sizes: the hierarchical ones, and plain vision transformers of the usual widths (without a class token)."""


def preset(size: str, **changes: Any) -> VisionConfig:
    """The configuration of a named size.

    Args:
        size: a key of :data:`SIZES`.
        **changes: any other attribute of :class:`VisionConfig`; they go before the preset's own.

    Raises:
        ValueError: for an unknown size, or changes that make no sense.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; known sizes are {', '.join(SIZES)}")
    return VisionConfig(**{**SIZES[size], **changes})


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
