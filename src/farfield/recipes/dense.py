"""dense: exact softmax attention, the yardstick."""

from __future__ import annotations

from farfield.near.dense import Dense
from farfield.recipes.registry import Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(setting: Setting) -> Parts:
    return Parts(near=Dense())


RECIPE = Recipe(
    name="dense",
    title="exact softmax attention",
    citation="Vaswani et al., Attention Is All You Need, NeurIPS 2017, arXiv 1706.03762",
    near="every token",
    far="none",
    merge="none",
    cost="n²",
    dims=(1, 2, 3),
    causal=True,
    proof="tests/recipes/test_dense.py::test_equals_a_softmax_written_out",
    parts=_parts,
)
