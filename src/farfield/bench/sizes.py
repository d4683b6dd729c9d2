"""Parameters and FLOPs of the named vision sizes, counted by shapes: nothing is trained, run or held in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from farfield import recipes
from farfield.bench.flops import Count, count_flops
from farfield.data.examples import size_in_words
from farfield.models.vision import SIZES, VisionConfig, VisionModel, preset

__all__ = ["SizeRow", "count_sizes"]


@dataclass(frozen=True)
class SizeRow:
    """One size with one attention at one input.

    Attributes:
        size: key of :data:`farfield.models.vision.SIZES`.
        widths: channels per stage.
        depths: blocks per stage.
        tokens: grid of the first stage.
        count: what one forward pass of one image computes.
    """

    size: str
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    tokens: tuple[int, ...]
    count: Count

    def to_json(self) -> dict[str, Any]:
        """For ``--json``, with the FLOPs in all."""
        values = asdict(self)
        count = values.pop("count")
        return {**values, **count, "flops": self.count.flops}


def count_sizes(
    attention: str,
    grid: tuple[int, ...],
    *,
    sizes: Sequence[str] = tuple(SIZES),
    options: Mapping[str, Any] | None = None,
    outputs: int = 1000,
) -> list[SizeRow]:
    """Counts every size.

    Args:
        attention: name of a recipe.
        grid: pixels of one input: height and width, or frames, height and width. A video has patches within frames.
        sizes: keys of :data:`farfield.models.vision.SIZES`.
        options: of the recipe.
        outputs: classes.

    Raises:
        ValueError: for an unknown name or a recipe that cannot work so, with what would be accepted.
        TypeError: for an option that the recipe does not have.
    """
    works = recipes.get(attention).dims
    if len(grid) not in works:
        raise ValueError(
            f"recipe {attention!r} works in {', '.join(f'{d}-D' for d in works)}; {size_in_words(grid)} is "
            f"{len(grid)}-D: give height x width for 2-D, frames x height x width for 3-D"
        )
    rows = []
    for size in sizes:
        config = _config(size, len(grid), attention=attention, options=dict(options or {}), outputs=outputs)
        with torch.device("meta"):
            model = VisionModel(config)
        tokens = tuple(-(-n // p) for n, p in zip(grid, config.patches, strict=True))
        rows.append(SizeRow(size, config.widths, config.depths, tokens, count_flops(model, config.channels, grid)))
    return rows


def _config(size: str, dims: int, **changes: Any) -> VisionConfig:
    if dims == 3 and size in SIZES:
        patch, step = SIZES[size].get("patch", VisionConfig.patch), VisionConfig.downsample
        changes |= {"dims": 3, "patch": (1, patch, patch), "downsample": (1, step, step)}
    return preset(size, **changes)
