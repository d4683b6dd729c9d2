"""focal: a window, a ring of tokens around it and pooled windows farther away, in one softmax."""

from __future__ import annotations

from typing import Any

from farfield.far.pooled import Pooled
from farfield.near.window import Window
from farfield.recipes.registry import ByDims, Parts, Recipe, Setting

__all__ = ["RECIPE"]

_SIZE: Any = ByDims(7, 7, 4)
_RING: Any = ByDims(3, 3, 1)


def _parts(
    setting: Setting,
    size: int | tuple[int, ...] = _SIZE,
    ring: int = _RING,
    reach: int | tuple[int, ...] = 3,
    summary: str = "learned",
) -> Parts:
    sides = (size,) * setting.dims if isinstance(size, int) else size
    far = Pooled(size, reach=reach, summary=summary, bias=True)
    if setting.causal:
        # The cells of the past begin before the query's own cell, which the window has to cover.
        return Parts(near=Window(tuple(side + ring for side in sides)), far=far)
    return Parts(near=Window(tuple(side + 2 * ring for side in sides), stride=sides), far=far)


RECIPE = Recipe(
    name="focal",
    title="focal attention: fine around the window, pooled farther away",
    citation="Yang et al., Focal Self-attention, NeurIPS 2021, arXiv 2107.00641",
    near="window of size tokens and a ring around it",
    far="one pooled key per window, reach windows to every side",
    merge="softmax",
    cost="n·((size + 2·ring) + (2·reach + 1)) per axis",
    dims=(1, 2, 3),
    causal=True,
    proof="tests/recipes/test_focal.py::test_equals_one_softmax_over_ring_and_pooled_windows",
    departures=(
        "one pooled level, as in the released models, with one `reach` for all stages; the ring is gathered once "
        "instead of by rolling, which repeats corners, and at the borders window and ring move inside; no bias "
        "by offset within them, only between cells"
    ),
    parts=_parts,
)
