"""l2vit: layers of local window attention alternate with layers of enhanced linear attention."""

from __future__ import annotations

from farfield.far.linear import Linear
from farfield.near.window import Window
from farfield.recipes.registry import Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(setting: Setting, window: int = 7, floor: float = 100.0) -> Parts:
    if setting.layer % 2 == 0:
        return Parts(near=Window(window, stride=window))
    return Parts(far=Linear("relu", floor=floor, temperature=True))


RECIPE = Recipe(
    name="l2vit",
    title="window attention in even layers, linear attention with a floored denominator in odd ones",
    citation="Zheng, The Linear Attention Resurrection in Vision Transformer (L2ViT), arXiv 2501.16182",
    near="blocked window (even layers)",
    far="linear, relu features (odd layers)",
    merge="in sequence",
    cost="n·window per axis; n·head_dim",
    dims=(1, 2, 3),
    causal=True,
    proof="tests/recipes/test_l2vit.py::test_equals_the_explicit_floored_matrix",
    departures=(
        "the denominator is at least 100, as in released code, whose alternative path, said to be the same, has "
        "1: where there are few tokens rows sum to less than the temperature; left out are the convolutions "
        "around the attention (CPE before, LCM after it), which belong to the model's block"
    ),
    parts=_parts,
)
