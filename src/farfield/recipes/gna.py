"""gna: generalized neighborhood attention, windows that advance by a stride."""

from __future__ import annotations

from typing import Any

from farfield.near.window import Window
from farfield.recipes.registry import ByDims, Parts, Recipe, Setting

__all__ = ["RECIPE"]

_SIZE: Any = ByDims(96, 24, 6)
_STRIDE: Any = ByDims(32, 8, 2)


def _parts(setting: Setting, size: int | tuple[int, ...] = _SIZE, stride: int | tuple[int, ...] = _STRIDE) -> Parts:
    return Parts(near=Window(size, stride=stride))


RECIPE = Recipe(
    name="gna",
    title="generalized neighborhood attention: stride neighbouring queries share one window",
    citation="Hassani et al., Generalized Neighborhood Attention, arXiv 2504.16922",
    near="size tokens per axis around a group of stride queries",
    far="none",
    merge="none",
    cost="n·size per axis",
    dims=(1, 2, 3),
    causal=True,
    proof="tests/recipes/test_gna.py::test_every_group_reads_the_keys_of_its_leader",
    departures=(
        "queries that share a window read that of their middle one (causal: of their last), as NATTEN's code "
        "chooses; left out are the extra keys beside the window that it takes"
    ),
    parts=_parts,
)
