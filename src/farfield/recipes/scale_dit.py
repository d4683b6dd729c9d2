"""scale_dit: windows at full resolution, guided by a low-resolution copy of the whole image."""

from __future__ import annotations

from typing import Any

from farfield.far.pooled import Pooled
from farfield.near.partition import Partition
from farfield.recipes.registry import ByDims, Parts, Recipe, Setting

__all__ = ["RECIPE"]

_SIZE: Any = ByDims(64, 16, 8)
_CELL: Any = ByDims(16, 4, 2)


def _parts(
    setting: Setting,
    size: int | tuple[int, ...] = _SIZE,
    cell: int | tuple[int, ...] = _CELL,
    reach: int | tuple[int, ...] | None = None,
) -> Parts:
    return Parts(near=Partition(size), far=Pooled(cell, reach=reach), merge="softmax")


RECIPE = Recipe(
    name="scale_dit",
    title="windows at full resolution and a low-resolution copy of the image, in one softmax",
    citation="Zhang, Tai, Scale-DiT, arXiv 2510.16325",
    near="tile of size tokens per axis",
    far="means over cells of the whole image",
    merge="softmax",
    cost="n·(size + n/cell) per axis",
    dims=(1, 2, 3),
    causal=False,
    proof="tests/recipes/test_scale_dit.py::test_equals_one_softmax_over_window_and_low_resolution",
    departures=(
        "the copy is made of means of the image's own keys and values, not of a stream of its own; left out are "
        "the text tokens and the adapted weights of the copy; of a large copy a window reads what `reach` allows "
        "instead of the part that lies over it"
    ),
    parts=_parts,
)
