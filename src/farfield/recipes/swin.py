"""swin: windows that share no token, shifted by half a window in odd layers."""

from __future__ import annotations

from farfield.geometry import integers
from farfield.near.partition import Partition
from farfield.recipes.registry import Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(setting: Setting, size: int | tuple[int, ...] = 7, bias: bool = True) -> Parts:
    halves = tuple(side // 2 for side in integers(size, "size"))
    shift = halves if isinstance(size, tuple) else halves[0]
    return Parts(near=Partition(size, shift=shift if setting.layer % 2 else 0, bias=bias))


RECIPE = Recipe(
    name="swin",
    title="windows in even layers, the same shifted by half a window in odd ones",
    citation="Liu et al., Swin Transformer, ICCV 2021, arXiv 2103.14030",
    near="tile of size tokens per axis, shifted in odd layers, with a bias by offset",
    far="none",
    merge="in sequence",
    cost="n·size per axis",
    dims=(1, 2, 3),
    causal=True,
    proof="tests/recipes/test_swin.py::test_equals_the_cyclic_shift_with_its_mask",
    departures="images that do not divide get smaller border tiles; released code pads, and the padding is seen",
    parts=_parts,
)
