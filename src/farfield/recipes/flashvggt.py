"""flashvggt: frames pooled to descriptors, and a few key frames in full."""

from __future__ import annotations

from farfield.far.pooled import Pooled
from farfield.near.anchors import Anchors
from farfield.recipes.registry import Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(setting: Setting, cell: int = 4, every: int = 200, summary: str = "mean") -> Parts:
    # Frames are pooled one by one.
    return Parts(near=Anchors(every), far=Pooled((1, cell, cell), summary=summary), merge="softmax")


RECIPE = Recipe(
    name="flashvggt",
    title="compressed descriptor attention: all frames pooled, key frames in full, in one softmax",
    citation="Wang, Xu, FlashVGGT, CVPR 2026, arXiv 2512.01540",
    near="all tokens of every every-th frame",
    far="one key and value per cell of cell x cell tokens in each frame",
    merge="softmax",
    cost="n·(n/cell² + n/every)",
    dims=(3,),
    causal=False,
    proof="tests/recipes/test_flashvggt.py::test_equals_one_softmax_over_key_frames_and_descriptors",
    departures=(
        "in 3-D only, as frames are what it pools and keeps; key frames are evenly spaced instead of chosen by "
        "k-means, as many and frame 0 among them; pooled by means, where a bilinear resize reads 4 tokens of a "
        "cell; left out are the camera and register tokens of a frame and the attention within frames between "
        "these layers"
    ),
    parts=_parts,
)
