"""na: neighborhood attention, a sliding window that keeps its size at the borders."""

from __future__ import annotations

from farfield.near.window import Window
from farfield.recipes.registry import Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(setting: Setting, size: int | tuple[int, ...] = 7) -> Parts:
    return Parts(near=Window(size))


RECIPE = Recipe(
    name="na",
    title="neighborhood attention: as many neighbours for every pixel, at the borders too",
    citation="Hassani et al., Neighborhood Attention Transformer, CVPR 2023, arXiv 2204.07143",
    near="size nearest tokens per axis (causal: the size last ones)",
    far="none",
    merge="none",
    cost="n·size per axis",
    dims=(1, 2, 3),
    causal=True,
    proof="tests/recipes/test_na.py::test_every_query_reads_its_nearest_neighbours",
    departures="no bias by offset: the fused operators of NATTEN dropped it, too",
    parts=_parts,
)
