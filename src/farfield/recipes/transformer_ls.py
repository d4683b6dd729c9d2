"""transformer_ls: a window and dynamically projected landmarks in one softmax."""

from __future__ import annotations

from farfield.far.projection import Projection
from farfield.near.window import Window
from farfield.recipes.registry import BLOCK, Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(setting: Setting, block: int = BLOCK, rank: int = 8, dual_norm: bool = True) -> Parts:
    if setting.causal:
        # The window covers the query's own chunk, whose landmarks it may not see.
        near = Window(max(1, block * 3 // 2), kv_norm=dual_norm)
        return Parts(near=near, far=Projection(rank, chunk=block, norm=dual_norm))
    # Windows of 2 * block that advance by block: each block sees itself and half a block to both sides.
    return Parts(near=Window(2 * block, stride=block, kv_norm=dual_norm), far=Projection(rank, norm=dual_norm))


RECIPE = Recipe(
    name="transformer_ls",
    title="long-short attention: window and dynamic projection in one softmax, scales matched by two LayerNorms",
    citation="Zhu et al., Long-Short Transformer, NeurIPS 2021, arXiv 2107.02192",
    near="window of 2·block by blocks (causal: sliding, 1.5·block)",
    far="rank landmarks in all (causal: of every earlier block)",
    merge="softmax",
    cost="n·(2·block + rank); causal n·(1.5·block + rank·n/block)",
    dims=(1, 2, 3),
    causal=True,
    proof="tests/recipes/test_transformer_ls.py::test_equals_one_softmax_over_window_and_landmarks",
    departures=(
        "left out are the relative bias of the causal window, the class token and the convolution on the values; "
        "lengths need not divide"
    ),
    parts=_parts,
)
