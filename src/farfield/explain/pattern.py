"""Who sees whom: for every query and every key, exactly, through which summary, or not at all.

Integers only, from the definition of each part; no attention is computed. The picture is that of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from farfield import recipes
from farfield.far.channels import Channels
from farfield.far.landmarks import Landmarks
from farfield.far.linear import Linear
from farfield.far.multigrid import Multigrid
from farfield.far.pooled import Pooled
from farfield.far.projection import Projection
from farfield.far.pyramid import Pyramid
from farfield.far.relay import Relay
from farfield.far.spectrum import Spectrum
from farfield.geometry import EMPTY, Ints, default_levels, geometry, per_axis
from farfield.near.anchors import Anchors
from farfield.near.blocks import Blocks
from farfield.near.conv import Conv
from farfield.near.dense import Dense
from farfield.near.dynamic_conv import DynamicConv
from farfield.near.global_queries import GlobalQueries
from farfield.near.partition import Partition
from farfield.near.window import Window
from farfield.ops.tiling import cells_in_reach
from farfield.parts import Part

Codes = npt.NDArray[np.int16]

EXACT = 0
"""Code of a key that the query sees itself. Codes >= 1 are the level of the summary through which it is seen."""
UNSEEN = -1
"""Code of a key that the query does not see."""
GLOBAL = -2
"""Code of a key that is seen only mixed with many others, near and far, into landmarks or a linear state."""

MOST_TOKENS = 8192
"""Longest sequence for which the N x N table is made."""


@dataclass(frozen=True)
class Pattern:
    """The table of one attention.

    Attributes:
        name: of the attention.
        grid: lengths of the axes, with product N.
        causal: whether later tokens are out of sight.
        codes: int16 [N, N], rows are queries: :data:`EXACT`, a level >= 1, :data:`UNSEEN` or :data:`GLOBAL`.
        cells: int64 [levels, N], which cell of level l + 1 holds each token (the cell gives one summary).
        landmarks: mean number of landmarks that a query reads; 0 without any, and for a linear state.
    """

    name: str
    grid: tuple[int, ...]
    causal: bool
    codes: npt.NDArray[np.int16]
    cells: Ints
    landmarks: float = 0.0

    @property
    def tokens(self) -> int:
        """N."""
        return prod(self.grid)

    @cached_property
    def levels(self) -> list[int]:
        """The levels that occur."""
        return [int(code) for code in np.unique(self.codes) if code >= 1]

    @cached_property
    def exact_per_query(self) -> float:
        """Mean number of tokens that a query sees themselves."""
        return float((self.codes == EXACT).sum(1).mean())

    @cached_property
    def summaries_per_query(self) -> float:
        """Mean number of summaries of levels that a query sees."""
        total = 0.0
        for level in self.levels:
            cell = self.cells[level - 1]
            share = 1.0 / np.bincount(cell)[cell]  # the tokens of a cell count as one together
            total += float(((self.codes == level) @ share).mean())
        return total

    @property
    def has_global(self) -> bool:
        """Whether some key is seen only through landmarks or a linear state."""
        return bool((self.codes == GLOBAL).any())


def visibility(name: str, shape: int | Sequence[int], causal: bool = True, *, layer: int = 0, **options: Any) -> Ints:
    """The codes alone: see :func:`pattern`.

    Returns:
        int64 [N, N]: 0 exact, l >= 1 through a summary of level l, -1 unseen, -2 mixed into landmarks or a state.
    """
    return pattern(name, shape, causal, layer=layer, **options).codes.astype(np.int64)


def pattern(name: str, shape: int | Sequence[int], causal: bool = True, *, layer: int = 0, **options: Any) -> Pattern:
    """Who sees whom under a recipe.

    Args:
        name: of a recipe.
        shape: number of tokens n, or the lengths of a grid's axes (tokens row-major).
        causal: whether later tokens are out of sight; 1-D.
        layer: index of the layer, for recipes that alternate.
        **options: of the recipe, such as ``block=16, rank=4``.

    Raises:
        ValueError: for an unknown recipe, a grid or setting in which it does not work, or more than 8,192 tokens.
        TypeError: for an option that the recipe does not have.

    Complexity:
        O(N^2) time and memory.
    """
    grid = (shape,) if isinstance(shape, int) else tuple(shape)
    if not 1 <= len(grid) <= 3 or any(n < 1 for n in grid):
        raise ValueError(f"shape={shape!r}: give a number of tokens >= 1, or one to three axis lengths, each >= 1")
    if prod(grid) > MOST_TOKENS:
        raise ValueError(f"{prod(grid):,} tokens need a picture of that many rows; at most {MOST_TOKENS:,} are drawn")
    if causal and len(grid) > 1:
        raise ValueError(f"causal pictures are of sequences (1-D); the grid {grid} has {len(grid)} axes")
    # Builds the smallest layer, so that what the layer would refuse is refused here, with its own words.
    built = recipes.build(name, 16, 1, causal=causal, layer=layer, dims=len(grid), **options)
    return pattern_of_parts(name, built.near_spec, built.far_spec, grid, causal)


def pattern_of_parts(name: str, near: Part | None, far: Part | None, grid: tuple[int, ...], causal: bool) -> Pattern:
    """Who sees whom under a near and a far field that need not be a recipe's; arguments as in :func:`pattern`.

    Raises:
        ValueError: for a part whose picture is not known.
    """
    tokens = prod(grid)
    codes = np.full((tokens, tokens), UNSEEN, dtype=np.int16)
    cells: Ints = np.zeros((0, tokens), dtype=np.int64)
    landmarks = 0.0
    if far is not None:
        if isinstance(far, Pyramid):
            cells = _pyramid(codes, far, near, grid, causal)
        elif isinstance(far, Landmarks):
            codes[:] = GLOBAL
            landmarks = float(
                prod(min(c, n) for c, n in zip(per_axis(far.count, len(grid), "count"), grid, strict=True))
            )
        elif isinstance(far, Projection):
            landmarks = _projection(codes, far, causal)
        elif isinstance(far, Pooled):
            cells = _pooled(codes, far, grid, causal)
        elif isinstance(far, Multigrid):
            cells = _multigrid(codes, far, grid)
        elif isinstance(far, Relay):
            codes[:] = GLOBAL
            landmarks = float(far.count)
        elif isinstance(far, Spectrum):
            codes[_lags(grid, per_axis(far.size, len(grid), "size"))] = GLOBAL
        elif isinstance(far, Linear | Channels):
            _everything(codes, causal, GLOBAL)
        else:
            raise ValueError(f"no picture is known for the far field {far!r} of {name!r}")
    if near is not None:
        _near(codes, near, grid, causal, name)
    return Pattern(name, grid, causal, codes, cells, landmarks)


def _coordinates(grid: tuple[int, ...]) -> Ints:
    """[dims, N] coordinates of the tokens, row-major."""
    return np.indices(grid).reshape(len(grid), -1).astype(np.int64)


def _flat(coordinates: Ints, counts: tuple[int, ...]) -> Ints:
    return np.asarray(np.ravel_multi_index(tuple(coordinates), counts), dtype=np.int64)


def _everything(codes: Codes, causal: bool, code: int) -> None:
    tokens = len(codes)
    if causal:
        codes[np.tri(tokens, dtype=bool)] = code
    else:
        codes[:] = code


def _near(codes: Codes, part: Part, grid: tuple[int, ...], causal: bool, name: str) -> None:
    if isinstance(part, Dense):
        _everything(codes, causal, EXACT)
    elif isinstance(part, Blocks):
        seen = _block_neighbours(grid, part.block)
        codes[seen & np.tri(len(codes), dtype=bool) if causal else seen] = EXACT
    elif isinstance(part, Window):
        codes[_window(grid, part, causal)] = EXACT
    elif isinstance(part, Partition | GlobalQueries):
        tile = _tile(grid, part if isinstance(part, Partition) else Partition(part.size), causal)
        seen = tile[:, None] == tile
        codes[seen & np.tri(len(codes), dtype=bool) if causal else seen] = EXACT
    elif isinstance(part, Anchors):
        frame = _coordinates(grid)[0]
        seen = np.broadcast_to(frame % part.every == 0, codes.shape)
        codes[seen & np.tri(len(codes), dtype=bool) if causal else seen] = EXACT
    elif isinstance(part, Conv | DynamicConv):
        codes[_kernel(grid, per_axis(part.kernel, len(grid), "kernel"), causal)] = EXACT
    else:
        raise ValueError(f"no picture is known for the near field {part!r} of {name!r}")


def _block_neighbours(grid: tuple[int, ...], block: int | tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """[N, N] whether the leaf blocks of two tokens are adjacent."""
    tree = geometry(grid, block, 1)
    own = _flat(_coordinates(grid) // np.array(tree.block)[:, None], tree.group_counts(1))
    return _listed(tree.near_list(), tree.blocks)[np.ix_(own, own)]


def _listed(table: Ints, groups: int) -> npt.NDArray[np.bool_]:
    """[rows, groups] a table of lists as a matrix."""
    seen = np.zeros((len(table), groups), dtype=bool)
    rows, places = np.nonzero(table != EMPTY)
    seen[rows, table[rows, places]] = True
    return seen


def _pyramid(codes: Codes, far: Pyramid, near: Part | None, grid: tuple[int, ...], causal: bool) -> Ints:
    """Writes the levels; returns the cells [levels, N]."""
    assert isinstance(near, Blocks)  # a pyramid is refused beside anything else
    dims = len(grid)
    block = per_axis(near.block, dims, "block")
    # As in the layer: a length that is too short for the levels that were asked for has all that it can have.
    levels = None if far.levels is None else min(far.levels, default_levels(grid, block))
    tree = geometry(grid, block, per_axis(far.rank, dims, "rank"), levels)
    place = _coordinates(grid)
    cells = np.zeros((tree.levels, tree.tokens), dtype=np.int64)
    for level in range(1, tree.levels + 1):
        group = _flat(place // np.array(tree.group_side(level))[:, None], tree.group_counts(level))
        seen = _listed(tree.far_list(level, causal), tree.group_total(level))
        codes[seen[np.ix_(group, group)]] = level
        side = tree.cell_side(level)
        counts = tuple(-(-n // s) for n, s in zip(grid, side, strict=True))
        cells[level - 1] = _flat(place // np.array(side)[:, None], counts)
    if far.sinks:
        leading = codes[:, : far.sinks]
        leading[leading != UNSEEN] = EXACT
        # Sinks are left out of every summary; here they get cells of their own, which nobody sees.
        cells[:, : far.sinks] = tree.tokens + np.arange(far.sinks)[: tree.tokens]
    return cells


def _projection(codes: Codes, far: Projection, causal: bool) -> float:
    """Writes what the landmarks mix; returns how many of them a query reads on average."""
    tokens = len(codes)
    if far.chunk is None:
        codes[:] = GLOBAL
        return float(far.rank)
    chunk = np.arange(tokens) // far.chunk
    codes[chunk[:, None] > chunk[None, :] if causal else slice(None)] = GLOBAL
    return float(far.rank * (chunk.mean() if causal else chunk[-1] + 1))


def _pooled(codes: Codes, far: Pooled, grid: tuple[int, ...], causal: bool) -> Ints:
    """Writes the cells as one level; returns the cells [1, N]."""
    tiles = far.tiling(grid, torch.device("cpu"))
    cell = np.asarray(tiles.place.numpy() // tiles.places, dtype=np.int64)
    reach = far.reaches(len(grid))
    if reach is None:
        codes[cell[None, :] < cell[:, None] if causal else slice(None)] = 1
    else:
        seen = _listed(cells_in_reach(far.counts(grid), reach, causal, torch.device("cpu")).numpy(), tiles.tiles)
        codes[seen[np.ix_(cell, cell)]] = 1
    return cell[None]


def _multigrid(codes: Codes, far: Multigrid, grid: tuple[int, ...]) -> Ints:
    """Writes the levels, the finest that sees a token last; returns the cells [levels, N]."""
    sizes, rates = (per_axis(v, len(grid), name) for v, name in ((far.size, "size"), (far.rate, "rate")))
    place, grids = _coordinates(grid), far.grids(grid)
    cells = np.zeros((len(grids), prod(grid)), dtype=np.int64)
    for level in range(len(grids), 0, -1):
        coarse = grids[level - 1]
        cell = _flat(place // (np.array(rates)[:, None] ** level), coarse)
        seen = _window(coarse, Window(sizes, stride=sizes), False)
        codes[seen[np.ix_(cell, cell)]] = level
        cells[level - 1] = cell
    return cells


def _lags(grid: tuple[int, ...], sizes: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """[N, N] what a circular convolution with a kernel of these sizes reads."""
    place = _coordinates(grid)
    seen = np.ones((prod(grid), prod(grid)), dtype=bool)
    for axis, (size, length) in enumerate(zip(sizes, grid, strict=True)):
        behind = (place[axis][:, None] - place[axis][None, :] + size // 2) % length
        seen &= behind < size
    return seen


def _kernel(grid: tuple[int, ...], sizes: tuple[int, ...], causal: bool) -> npt.NDArray[np.bool_]:
    """[N, N] what a convolution reads: nothing is moved at the borders."""
    place = _coordinates(grid)
    seen = np.ones((prod(grid), prod(grid)), dtype=bool)
    for axis, size in enumerate(sizes):
        ahead = place[axis][None, :] - place[axis][:, None]
        seen &= (ahead <= 0) & (ahead > -size) if causal else abs(ahead) <= size // 2
    return seen


def _tile(grid: tuple[int, ...], part: Partition, causal: bool) -> Ints:
    """[N] the tile of every token."""
    tiles = part.tiling(grid, torch.device("cpu"), causal)
    return np.asarray(tiles.place.numpy() // tiles.places, dtype=np.int64)


def _window(grid: tuple[int, ...], part: Window, causal: bool) -> npt.NDArray[np.bool_]:
    """[N, N] the window of generalised neighbourhood attention (NATTEN), the product over axes."""
    dims = len(grid)
    sizes, strides, dilations = part.rule(grid)
    place = _coordinates(grid)
    seen = np.ones((prod(grid), prod(grid)), dtype=bool)
    for axis in range(dims):
        table = _window_axis(grid[axis], sizes[axis], strides[axis], dilations[axis], causal)
        seen &= table[np.ix_(place[axis], place[axis])]
    return seen


def _window_axis(length: int, size: int, stride: int, dilation: int, causal: bool) -> npt.NDArray[np.bool_]:
    """[length, length] one axis of a window.

    Tokens of one residue modulo the dilation form a row of their own; windows keep their size at the borders;
    ``stride`` consecutive queries share the window of their leader.
    """
    i = np.arange(length)[:, None]
    j = np.arange(length)[None, :]
    own, other = i // dilation, j // dilation
    count = -(-(length - i % dilation) // dilation)
    same = i % dilation == j % dilation
    if causal:
        leader = np.minimum(own // stride * stride + stride - 1, count - 1)
        return np.asarray(same & (other <= own) & (other > leader - size))
    size_here = np.minimum(size, count)
    before = size_here // 2
    after = size_here - before - 1
    leader = np.minimum(own // stride * stride + stride // 2, count - 1)
    centre = np.clip(leader, before, count - 1 - after)
    return np.asarray(same & (other >= centre - before) & (other <= centre + after))
