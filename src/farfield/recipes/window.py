"""window: sliding-window attention, a near field alone."""

from __future__ import annotations

from farfield.near.window import Window
from farfield.recipes.registry import BLOCK, Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(
    setting: Setting, block: int = BLOCK, size: int | tuple[int, ...] | None = None, stride: int = 1, dilation: int = 1
) -> Parts:
    if size is None:
        # As many exact keys as the multipole method's near field reads on average, so that the two compare.
        size = max(1, block * 3 // 2) if setting.causal else 3 * block
    return Parts(near=Window(size, stride=stride, dilation=dilation))


RECIPE = Recipe(
    name="window",
    title="sliding-window (neighborhood) attention",
    citation="Hassani et al., Neighborhood Attention Transformer, CVPR 2023, arXiv 2204.07143",
    near="size tokens around (causal: before) the query",
    far="none",
    merge="none",
    cost="n·size",
    dims=(1, 2, 3),
    causal=True,
    proof="tests/recipes/test_window.py::test_equals_the_index_rule",
    departures=("no bias by offset: the fused operators of NATTEN dropped it, too; a causal window ends at its query"),
    parts=_parts,
)
