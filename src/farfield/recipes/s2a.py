"""s2a: strip self-attention, few channels for the scores and pooled keys."""

from __future__ import annotations

from typing import Any

from farfield.far.pooled import Pooled
from farfield.recipes.registry import ByDims, Parts, Recipe, Setting

__all__ = ["RECIPE"]

_CELL: Any = ByDims(8, 4, 2)


def _parts(
    setting: Setting, cell: int | tuple[int, ...] = _CELL, rank: int | None = 1, summary: str = "learned"
) -> Parts:
    return Parts(far=Pooled(cell, summary=summary, rank=rank))


RECIPE = Recipe(
    name="s2a",
    title="strip self-attention: pooled keys and values, scores from few channels",
    citation="Xu et al., S2AFormer, arXiv 2505.22195",
    near="none",
    far="one key and value per cell, scores from rank channels",
    merge="none",
    cost="n·n/cell per axis",
    dims=(1, 2, 3),
    causal=False,
    proof="tests/recipes/test_s2a.py::test_scores_have_the_rank_and_the_limit_is_exact",
    departures=(
        'no code was released; that "strip" means one channel per head, and that a convolution as large as a cell '
        "pools it, are readings of the text; the convolutions around the attention belong to the model's block"
    ),
    parts=_parts,
)
