"""maxvit: multi-axis attention, windows of neighbours in even layers, grids of spread tokens in odd ones."""

from __future__ import annotations

from farfield.near.partition import Partition
from farfield.recipes.registry import Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(setting: Setting, size: int | tuple[int, ...] = 7, bias: bool = True) -> Parts:
    return Parts(near=Partition(size, spread=setting.layer % 2 == 1, bias=bias))


RECIPE = Recipe(
    name="maxvit",
    title="multi-axis attention: windows in even layers, a grid spread over the image in odd ones",
    citation="Tu et al., MaxViT, ECCV 2022, arXiv 2204.01697",
    near="tile of size neighbours per axis (even layers), of size tokens spread over all (odd layers)",
    far="none",
    merge="in sequence",
    cost="n·size per axis",
    dims=(1, 2, 3),
    causal=False,
    proof="tests/recipes/test_maxvit.py::test_grid_attention_is_block_attention_of_permuted_pixels",
    departures=(
        "images that do not divide get smaller tiles; the convolution before them (MBConv) belongs to the model's block"
    ),
    parts=_parts,
)
