"""inline: injective linear attention beside a convolution whose kernel the input chooses."""

from __future__ import annotations

from farfield.far.linear import Linear
from farfield.near.dynamic_conv import DynamicConv
from farfield.recipes.registry import Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(setting: Setting, kernel: int | tuple[int, ...] = 3, feature: str = "identity") -> Parts:
    return Parts(near=DynamicConv(kernel), far=Linear(feature, normalise="subtract"), merge="sum")


RECIPE = Recipe(
    name="inline",
    title="InLine attention: linear attention normalised by subtraction, and a predicted local kernel",
    citation="Han et al., Bridging the Divide, NeurIPS 2024, arXiv 2412.06590",
    near="depthwise convolution with a kernel made from the mean token",
    far="linear, normalised by subtraction",
    merge="sum",
    cost="n·head_dim",
    dims=(1, 2, 3),
    causal=False,
    proof="tests/recipes/test_inline.py::test_equals_the_explicit_matrix_with_rows_of_sum_one",
    departures=(
        "divides by the number of keys; released code for pooled keys divides by queries, and rows lose their "
        "sum of 1; there is no class token to keep out of the convolution"
    ),
    parts=_parts,
)
