"""gfnet: global filters, values multiplied by learned weights in Fourier space."""

from __future__ import annotations

from typing import Any

from farfield.far.spectrum import Spectrum
from farfield.recipes.registry import ByDims, Parts, Recipe, Setting

__all__ = ["RECIPE"]

_SIZE: Any = ByDims(64, 14, 8)


def _parts(setting: Setting, size: int | tuple[int, ...] = _SIZE) -> Parts:
    return Parts(far=Spectrum(size))


RECIPE = Recipe(
    name="gfnet",
    title="global filter: a learned circular convolution by Fourier transform",
    citation="Rao et al., Global Filter Networks, NeurIPS 2021, arXiv 2107.00645",
    near="none",
    far="every token, weighed by position alone",
    merge="none",
    cost="n·log n",
    dims=(1, 2, 3),
    causal=False,
    proof="tests/recipes/test_gfnet.py::test_equals_a_circular_convolution_written_out",
    departures=(
        "on another grid the kernel keeps its lags; released code interpolates frequencies without their wrap; "
        "the layer's projections of values and outputs stand around the filter, which has none in the paper, and "
        "those of queries and keys have no effect"
    ),
    parts=_parts,
)
