"""agent: agent attention, two softmaxes through pooled queries, beside a depthwise convolution."""

from __future__ import annotations

from farfield.far.landmarks import Landmarks
from farfield.near.conv import Conv
from farfield.recipes.registry import Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(setting: Setting, count: int | tuple[int, ...] = 7, kernel: int = 3) -> Parts:
    return Parts(near=Conv(kernel), far=Landmarks(count), merge="sum")


RECIPE = Recipe(
    name="agent",
    title="agent attention: pooled queries gather from all tokens and broadcast back",
    citation="Han et al., Agent Attention, ECCV 2024, arXiv 2312.08874",
    near="depthwise convolution on the values",
    far="count agents per axis",
    merge="sum",
    cost="2·n·agents",
    dims=(1, 2, 3),
    causal=False,
    proof="tests/recipes/test_agent.py::test_equals_the_two_matrix_product",
    departures=(
        "left out are the positional biases of both softmaxes, which fix the grid, and with them the class "
        "token's; where agents do not divide the grid, neighbouring cells share tokens"
    ),
    parts=_parts,
)
