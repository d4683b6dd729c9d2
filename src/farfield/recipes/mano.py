"""mano: windows on the grid and on ever coarser copies of it, summed."""

from __future__ import annotations

from farfield.far.multigrid import Multigrid
from farfield.near.window import Window
from farfield.recipes.registry import Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(
    setting: Setting,
    size: int | tuple[int, ...] = 7,
    rate: int | tuple[int, ...] = 2,
    levels: int | None = None,
    sampling: str = "learned",
) -> Parts:
    # More levels than it takes until one window holds a grid would show nothing new.
    return Parts(
        near=Window(size, stride=size), far=Multigrid(size, rate, levels=levels, sampling=sampling), merge="sum"
    )


RECIPE = Recipe(
    name="mano",
    title="multipole attention neural operator: a window softmax per resolution, summed from coarse to fine",
    citation="Colagrande et al., Linear Attention with Global Context, ICCV 2025 workshops, arXiv 2507.02748",
    near="blocked window of size tokens per axis",
    far="the same windows on coarser grids, fading",
    merge="sum",
    cost="n·size·(1 + 1/rate + ...) per axis",
    dims=(1, 2, 3),
    causal=False,
    proof="tests/recipes/test_mano.py::test_learned_sampling_equals_strided_convolutions",
    departures=(
        "windows do not overlap, where ports of the code average overlapping ones; sampling has weights per "
        "channel, on queries, keys and values, instead of a convolution that mixes channels of the input; levels "
        "end at the first grid that one window holds, in ports at `rate` cells per axis; how fast coarse levels "
        "fade is as in ports, whose second LayerNorm is left out"
    ),
    parts=_parts,
)
