"""Pyramids of means and shared summaries, compiled: what :mod:`farfield.ops.multipole.pyramid` does in torch.

The cells of all levels stand in one tensor [B * H, groups of all levels, P, D]. A table says which children every cell
has, so that one routine serves every dimension, every length and packed sequences.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from farfield.geometry import EMPTY, Geometry, Ints
from farfield.ops.compiled.build import check, library
from farfield.ops.compiled.tiles import DTYPES, pointer

__all__ = ["Reduction", "children", "reduce", "reduce_down", "reduction"]


class Reduction(ctypes.Structure):
    """``struct Reduction`` of the library."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("groups", "heads", "batches", "dim", "cells", "children", "dtype", "threads")
        ),
        ("below_stride", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("weight_heads", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("source", "to", "grad_from", "grad_weight")),
    )


def _cell_index(geometry: Geometry, level: int) -> Ints:
    """[C_1, .., C_d] where each cell of ``level`` stands, counted group by group."""
    counts, rank = geometry.group_counts(level), geometry.rank
    index = np.arange(prod(counts) * prod(rank), dtype=np.int64).reshape(*counts, *rank)
    d = geometry.dims
    order = [axis for a in range(d) for axis in (a, d + a)]
    return index.transpose(order).reshape([c * p for c, p in zip(counts, rank, strict=True)])


@lru_cache(maxsize=256)
def children(geometry: Geometry, level: int) -> Tensor:
    """[cells, children] int32: slots (level 1) or cells of the level below of which each cell is made; -1 for none.

    In the order of :func:`farfield.ops.multipole.pyramid.children`.
    """
    if level == 1:
        slots = np.arange(geometry.blocks * geometry.block_tokens, dtype=np.int64)
        d, counts = geometry.dims, geometry.group_counts(1)
        split = [n for p, c in zip(geometry.rank, geometry.cell_side(1), strict=True) for n in (p, c)]
        order = [*range(d), *(d + 2 * a for a in range(d)), *(d + 2 * a + 1 for a in range(d))]
        table = slots.reshape(*counts, *split).transpose(order).reshape(-1, prod(geometry.cell_side(1)))
    else:
        own, below = _cell_index(geometry, level), _cell_index(geometry, level - 1)
        pad = [(0, 2 * a - b) for a, b in zip(own.shape, below.shape, strict=True)]
        below = np.pad(below, pad, constant_values=EMPTY)
        cuts = itertools.product(range(2), repeat=geometry.dims)
        parts = np.stack([below[tuple(slice(c, None, 2) for c in cut)].reshape(-1) for cut in cuts], 1)
        table = np.empty_like(parts)
        table[own.reshape(-1)] = parts
    return torch.from_numpy(np.ascontiguousarray(table, dtype=np.int32))


def reduction(
    below: Tensor, cells: Tensor, table: Tensor, heads: int, coefficients: Tensor | None, weight: Tensor | None
) -> Reduction:
    """Cells as the sum over children of coefficient * weight * child; the caller keeps the tensors alive.

    Args:
        below: [B * H, n, D] float32, bfloat16 or float16, contiguous but for the first axis.
        cells: [B * H, cells, D] float32, written; contiguous but for the first axis.
        table: of :func:`children`.
        heads: H.
        coefficients: [B', cells, children] float32 or None for 1.
        weight: [1 or H, children, D] float32 or None for 1 / children.
    """
    for x in (below, cells):
        assert x[0].is_contiguous()
    return Reduction(
        groups=below.shape[0], heads=heads, batches=0 if coefficients is None else coefficients.shape[0],
        dim=below.shape[2], cells=table.shape[0], children=table.shape[1],
        dtype=DTYPES[below.dtype], threads=torch.get_num_threads(), below_stride=below.stride(0),
        stride=cells.stride(0), table=pointer(table), coefficients=pointer(coefficients), weight=pointer(weight),
        weight_heads=0 if weight is None else weight.shape[0], source=below.data_ptr(), to=cells.data_ptr(),
    )  # fmt: skip


def reduce(reductions: Sequence[Reduction]) -> None:
    """Carries out reductions one after another, in one call: each may read what those before it wrote."""
    array = (Reduction * len(reductions))(*reductions)
    check(library().farfield_reduce(array, len(reductions)))


def reduce_down(
    grad: Tensor,
    below: Tensor,
    grad_below: Tensor,
    table: Tensor,
    heads: int,
    coefficients: Tensor | None,
    weight: Tensor | None,
) -> Tensor | None:
    """Adds to ``grad_below`` the gradient of :func:`reduce` for ``grad`` of its cells; returns that of ``weight``."""
    call = reduction(below, grad, table, heads, coefficients, weight)
    assert grad_below[0].is_contiguous() and (grad_below.shape[0] == 1 or grad_below.stride(0) == below.stride(0))
    grad_weight = None if weight is None else torch.zeros_like(weight)
    call.grad_from, call.grad_weight = grad_below.data_ptr(), pointer(grad_weight)
    check(library().farfield_reduce_down(ctypes.byref(call)))
    return grad_weight
