"""blocks: the near field of the multipole method alone."""

from __future__ import annotations

from farfield.near.blocks import Blocks
from farfield.recipes.registry import BLOCK, Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(setting: Setting, block: int | tuple[int, ...] = BLOCK) -> Parts:
    return Parts(near=Blocks(block))


RECIPE = Recipe(
    name="blocks",
    title="own and adjacent leaf blocks: fma without its far field",
    citation="Kang, Tran, De Sterck, Fast Multipole Attention, arXiv 2310.11960",
    near="own and adjacent blocks of block tokens",
    far="none",
    merge="none",
    cost="n·3·block (causal: half)",
    dims=(1, 2, 3),
    causal=True,
    proof="tests/recipes/test_blocks.py::test_sees_exactly_the_adjacent_blocks",
    departures="an ablation: the near field of `fma` without the far field",
    parts=_parts,
)
