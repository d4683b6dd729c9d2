"""relay: tiles, and relay tokens through which tiles exchange what they hold."""

from __future__ import annotations

from typing import Any

from farfield.far.relay import Relay
from farfield.near.partition import Partition
from farfield.recipes.registry import ByDims, Parts, Recipe, Setting

__all__ = ["RECIPE"]

_SIZE: Any = ByDims(64, 16, 8)


def _parts(setting: Setting, size: int | tuple[int, ...] = _SIZE, count: int = 3) -> Parts:
    return Parts(near=Partition(size), far=Relay(size, count), merge="softmax")


RECIPE = Recipe(
    name="relay",
    title="global-local relay attention: a tile and the relays that speak for the others",
    citation="Huang et al., RelayFormer, arXiv 2508.09459",
    near="tile of size tokens per axis",
    far="count relays per tile, which exchange globally",
    merge="softmax",
    cost="n·(size per axis + 2·count) + (tiles·count)²",
    dims=(1, 2, 3),
    causal=False,
    proof="tests/recipes/test_relay.py::test_equals_three_softmaxes_written_out",
    departures=(
        "relays are made from their tile in every layer; the paper's live through all layers, with adapted "
        "weights and rotary positions of their own; tiles do not overlap, so that there is nothing to average on "
        "their seams"
    ),
    parts=_parts,
)
