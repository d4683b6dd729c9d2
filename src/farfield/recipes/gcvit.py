"""gcvit: windows in even layers; in odd ones the same windows read with queries pooled from the whole image."""

from __future__ import annotations

from farfield.near.global_queries import GlobalQueries
from farfield.near.partition import Partition
from farfield.recipes.registry import Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(setting: Setting, size: int | tuple[int, ...] = 7, bias: bool = True) -> Parts:
    if setting.layer % 2 == 0:
        return Parts(near=Partition(size, bias=bias))
    return Parts(near=GlobalQueries(size, bias=bias))


RECIPE = Recipe(
    name="gcvit",
    title="windows in even layers, windows read by global queries in odd ones",
    citation="Hatamizadeh et al., Global Context Vision Transformers, ICML 2023, arXiv 2206.09959",
    near="tile of size tokens per axis, with a bias by offset",
    far="queries pooled from the whole image (odd layers)",
    merge="in sequence",
    cost="n·size per axis",
    dims=(1, 2, 3),
    causal=False,
    proof="tests/recipes/test_gcvit.py::test_equals_a_loop_over_windows_with_shared_queries",
    departures=(
        "global queries are made in every odd layer from the queries of its tokens, the paper makes them once "
        "per stage from the stage's input; one pooling to a tile instead of repeated halving, so that any grid "
        "works; every image of a batch has its own, which copies of the released code mix up"
    ),
    parts=_parts,
)
