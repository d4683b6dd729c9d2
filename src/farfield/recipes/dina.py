"""dina: neighborhood attention in even layers, the same as widely dilated as it fits in odd ones."""

from __future__ import annotations

from farfield.near.window import Window
from farfield.recipes.registry import Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(setting: Setting, size: int | tuple[int, ...] = 7, dilation: int | tuple[int, ...] | None = None) -> Parts:
    if setting.layer % 2 == 0:
        return Parts(near=Window(size))
    if dilation is None and setting.causal:
        # The widest depends on the length, which a causal layer may not know. This one makes two layers gapless: the
        # dilated one reaches size windows back, and each of them is the window of a layer before it.
        dilation = size
    return Parts(near=Window(size, dilation=dilation))


RECIPE = Recipe(
    name="dina",
    title="dilated neighborhood attention: local layers alternate with layers dilated across the image",
    citation="Hassani, Shi, Dilated Neighborhood Attention Transformer, arXiv 2209.15001",
    near="size nearest tokens per axis (even layers); every dilation-th, by default spread over all (odd layers)",
    far="none",
    merge="in sequence",
    cost="n·size per axis",
    dims=(1, 2, 3),
    causal=True,
    proof="tests/recipes/test_dina.py::test_equals_neighborhood_attention_of_every_residue",
    departures=(
        "the widest dilation follows the grid instead of a list per model; causal layers use `size`; no bias by offset"
    ),
    parts=_parts,
)
