"""The cost model: useful FLOPs, bytes and the least time of an attention, counted from its geometry before it runs.

Conventions, per batch entry and head, for D channels:

- a *pair* is a query that meets one token, or one summary, in a softmax. Only pairs that the rule wants are counted
  (the triangle of a causal order, windows cut at borders), however many an implementation touches;
- a pair costs 4 D FLOPs forward (score and value, a multiply-add is 2), and 10 D backward (the scores once more and
  four products), so 14 D forward and backward: FlashAttention's convention;
- making summaries and states costs 2 FLOPs per multiply-add forward and twice that backward. Projections outside the
  attention, exponentials, norms and rotations are not counted;
- bytes are those that must move if every tensor moved once: q, k, v in and the output out; forward and backward also
  q, k, v, output and its gradient in, three gradients out, and the log-sum-exp out and in; summaries and states in
  float32 (float64 for float64) out and in, their gradients as well. Keys that several blocks read are read once.

The *floor* is the larger of FLOPs / rate of matrix products and bytes / rate of memory, both measured on this machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from farfield.bench.case import Case
from farfield.far.channels import Channels
from farfield.far.landmarks import Landmarks
from farfield.far.linear import Linear
from farfield.far.multigrid import Multigrid
from farfield.far.pooled import Pooled
from farfield.far.projection import Projection
from farfield.far.pyramid import Pyramid
from farfield.far.relay import Relay
from farfield.far.spectrum import Spectrum
from farfield.geometry import EMPTY, Geometry, Ints, default_levels, geometry, per_axis
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

__all__ = ["MODES", "Floor", "Rates", "Work", "floor", "work_of"]

MODES = ("forward", "backward", "decode")
"""What is measured: the forward pass, forward and backward together, one new token against everything before it."""

_PAIR = 4
_BACKWARD_PAIRS = 2.5
_BACKWARD_SUMS = 2.0


@dataclass(frozen=True)
class Work:
    """What one batch entry and head has to do. Works add.

    Attributes:
        exact: pairs of a query and a token.
        far: pairs of a query (or of a cell of pooled queries) and a summary.
        sums: multiply-adds per channel besides, such as those that make summaries.
        products: multiply-adds per channel squared, such as those that make and read a linear state.
        stored: vectors of D numbers that are written and read in between.
    """

    exact: int = 0
    far: int = 0
    sums: int = 0
    products: int = 0
    stored: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: Work) -> Work:
        return Work(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def flops(self, case: Case, mode: str) -> float:
        """Useful FLOPs of a whole call."""
        pairs, rest = (1.0, 1.0) if mode != "backward" else (1 + _BACKWARD_PAIRS, 1 + _BACKWARD_SUMS)
        d = case.head_dim
        one = pairs * _PAIR * d * (self.exact + self.far) + rest * 2 * (d * self.sums + d * d * self.products)
        return case.batch * case.heads * one

    def bytes(self, case: Case, mode: str) -> float:
        """Bytes that a whole call must move."""
        wide = max(case.size, 4)
        vector, kept = case.head_dim * case.size, case.head_dim * wide * self.stored
        if mode == "decode":
            # The one query reads every key and value that it meets once.
            one = (2 + 2 * (self.exact + self.far)) * vector
        elif mode == "forward":
            one = 4 * case.tokens * vector + 2 * kept
        else:
            one = 12 * case.tokens * vector + 2 * case.tokens * wide + 5 * kept
        return case.batch * case.heads * float(one)


@dataclass(frozen=True)
class Rates:
    """What this machine reaches at best: FLOPs per second in matrix products, bytes per second in a copy."""

    matrix: float
    memory: float


@dataclass(frozen=True)
class Floor:
    """The least time in seconds, and what bounds it: "matrix" or "memory"."""

    seconds: float
    bound: str


def floor(flops: float, moved: float, rates: Rates) -> Floor:
    """The least time of a call with these FLOPs and bytes on a machine of these rates."""
    matrix, memory = flops / rates.matrix, moved / rates.memory
    return Floor(matrix, "matrix") if matrix >= memory else Floor(memory, "memory")


def work_of(near: Part | None, far: Part | None, case: Case) -> Work | None:
    """The work of a layer's two parts; None when one of them is not known here.

    Raises:
        ValueError: for a part that does not fit the grid.
    """
    if not is_known(near) or not is_known(far):
        return None
    total = Work()
    for part in (near, far):
        if part is not None:
            total += _COUNTS[type(part)](part, case, near)
    return total


def is_known(part: Part | None) -> bool:
    """Whether the work of a part follows from the grid; what a pyramid opens hangs on the content."""
    return part is None or (type(part) in _COUNTS and not (isinstance(part, Pyramid) and part.open > 0))


def dense(case: Case) -> Work:
    """Every token, or every earlier one and itself."""
    n = case.tokens
    return Work(exact=n * (n + 1) // 2 if case.causal else n * n)


def decode(case: Case) -> Work:
    """One query against all tokens."""
    return Work(exact=case.tokens)


def blocks(case: Case, block: int | tuple[int, ...], sinks: int = 0) -> Work:
    """The token's own leaf block and the adjacent ones, and sinks that lie in none of them."""
    shape = geometry(case.grid, block, 1, None)
    sizes, held = _tokens_of_groups(shape, 1), _sinks_of_blocks(shape, sinks)
    table = shape.near_list(case.causal)
    used = table != EMPTY
    if case.causal:
        # Place 0 is the block itself, a triangle; what else is listed lies before it.
        others = np.where(used, sizes[table], 0)[:, 1:].sum(1)
        pairs = sizes * (sizes + 1) // 2 + sizes * others
    else:
        pairs = sizes * np.where(used, sizes[table], 0).sum(1)
    if case.causal:
        outside = np.concatenate(([0, 0], np.cumsum(held)))[: len(held)]  # in the blocks before the one to the left
    else:
        outside = held.sum() - np.where(used, held[table], 0).sum(1)
    return Work(exact=int(pairs.sum() + (sizes * outside).sum()))


def window(
    case: Case,
    size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
) -> Work:
    """Windows: on every axis alone, since a window is the product of its axes."""
    axes = zip(case.grid, *(per_axis(v, case.dims, "window") for v in (size, stride, dilation)), strict=True)
    return Work(exact=math.prod(_window_axis(n, w, s, d, case.causal) for n, w, s, d in axes))


def _window_axis(length: int, size: int, stride: int, dilation: int, causal: bool) -> int:
    """Pairs on one axis, by the rule of :func:`farfield.ops.window.window_attention`."""
    if not causal:
        return length * min(size, length)
    total = 0
    for residue in range(min(dilation, length)):
        places = -(-(length - residue) // dilation)
        reach = min(size, places) if dilation == 1 else size
        step = min(stride, reach)
        place = np.arange(places)
        leader = np.minimum(place // step * step + step - 1, places - 1)
        total += int((place - np.maximum(leader - reach + 1, 0) + 1).sum())
    return total


def partition(case: Case, part: Partition) -> Work:
    """Tiles that share no token: the square of each, causal its triangle."""
    tiles = part.tiling(case.grid, torch.device("cpu"), case.causal)
    sizes = np.bincount(tiles.place.numpy() // tiles.places).astype(np.int64)
    return Work(exact=int((sizes * (sizes + 1) // 2).sum() if case.causal else (sizes**2).sum()))


def anchors(case: Case, every: int) -> Work:
    """All tokens of every every-th frame."""
    frames, rest = case.grid[0], case.tokens // case.grid[0]
    if case.causal:
        return Work(exact=int((np.arange(case.tokens) // every + 1).sum()))
    return Work(exact=case.tokens * -(-frames // every) * rest)


def pooled(case: Case, far: Pooled) -> Work:
    """Cells made from keys and values, and the queries that see them, or those in reach."""
    tiles = far.tiling(case.grid, torch.device("cpu"))
    sizes = np.bincount(tiles.place.numpy() // tiles.places).astype(np.int64)
    reach = far.reaches(case.dims)
    if reach is None:
        seen = int((sizes * np.arange(len(sizes))).sum()) if case.causal else case.tokens * tiles.tiles
    else:
        table = cells_in_reach(far.counts(case.grid), reach, case.causal, torch.device("cpu")).numpy()
        seen = int((sizes * (table != EMPTY).sum(1)).sum())
    compress = 0 if far.rank is None else far.rank * (case.tokens + tiles.tiles)
    return Work(far=seen, sums=2 * case.tokens + compress, stored=2 * tiles.tiles)


def multigrid(case: Case, far: Multigrid) -> Work:
    """Windows on every coarse grid, and what it takes to make it and to spread its output."""
    pairs = made = stored = 0
    fine = case.tokens
    for grid in far.grids(case.grid):
        coarse = replace(case, grid=grid)
        pairs += window(coarse, far.size, far.size).exact
        made += 4 * fine
        fine = coarse.tokens
        stored += 4 * fine
    return Work(far=pairs, sums=made, stored=stored)


def spectrum(case: Case) -> Work:
    """Two real transforms of 2.5 n log n operations per channel each, and the product on half of the frequencies."""
    n = case.tokens
    return Work(sums=round(2.5 * n * math.log2(max(n, 2))) + 2 * n)


def relay(case: Case, far: Relay) -> Work:
    """Relays read their tile and each other, tokens read the relays of their tile."""
    tiles = math.prod(-(-n // s) for n, s in zip(case.grid, per_axis(far.size, case.dims, "size"), strict=True))
    relays = tiles * far.count
    return Work(far=2 * case.tokens * far.count + relays**2, sums=2 * case.tokens, stored=4 * relays)


def pyramid(case: Case, far: Pyramid, block: int | tuple[int, ...]) -> Work:
    """The interaction lists of every level, and what it takes to make the summaries."""
    most = default_levels(case.grid, per_axis(block, case.dims, "block"))
    shape = geometry(case.grid, block, far.rank, None if far.levels is None else min(far.levels, most))
    pooled = None if far.query_rank is None else geometry(case.grid, block, far.query_rank, shape.levels)
    pairs = made = cells_in_all = 0
    children = case.tokens
    for level in range(1, shape.levels + 1):
        cells = _cells_of_groups(shape, level, far.sinks)
        askers = _tokens_of_groups(shape, level) if pooled is None else _cells_of_groups(pooled, level, 0)
        table = shape.far_list(level, case.causal)
        pairs += int((askers * np.where(table == EMPTY, 0, cells[table]).sum(1)).sum())
        total = int(cells.sum())
        made += case.tokens * shape.cells_per_group if far.summary == "learned" else children
        children = total
        cells_in_all += total + (0 if pooled is None else int(askers.sum()))
    scores = case.tokens if far.summary == "pooled" and shape.levels else 0
    return Work(far=pairs, sums=2 * made + scores, stored=2 * cells_in_all)


def projection(case: Case, far: Projection) -> Work:
    """Landmarks mixed from all tokens (or from each chunk), and the queries that see them."""
    n, rank = case.tokens, far.rank
    chunk = n if far.chunk is None else far.chunk
    chunks = -(-n // chunk)
    seen = int((np.arange(n) // chunk).sum()) if case.causal else n * chunks
    return Work(far=seen * rank, sums=n * rank * (case.heads + 2), stored=2 * chunks * rank)


def landmarks(case: Case, far: Landmarks) -> Work:
    """Agents read every token, then every query reads the agents."""
    counts = per_axis(far.count, case.dims, "count")
    agents = math.prod(min(c, n) for c, n in zip(counts, case.grid, strict=True))
    return Work(far=2 * case.tokens * agents, sums=case.tokens, stored=2 * agents)


def linear(case: Case) -> Work:
    """A state of D x D made from every token and read by every query."""
    return Work(products=2 * case.tokens, stored=case.head_dim)


def _tokens_of_groups(shape: Geometry, level: int) -> Ints:
    """[groups] tokens of every group of a level."""
    total: Ints = np.ones(1, dtype=np.int64)
    for n, side, count in zip(shape.grid, shape.group_side(level), shape.group_counts(level), strict=True):
        total = np.outer(total, np.minimum(n - np.arange(count) * side, side)).reshape(-1)
    return total


def _cells_of_groups(shape: Geometry, level: int, sinks: int) -> Ints:
    """[groups] cells of every group that hold a token which is no sink."""
    counts, sides = shape.group_counts(level), shape.cell_side(level)
    places = np.unravel_index(np.arange(sinks, shape.tokens), shape.grid)
    cells = tuple(c * p for c, p in zip(counts, shape.rank, strict=True))
    index = np.ravel_multi_index(tuple(x // side for x, side in zip(places, sides, strict=True)), cells)
    held = np.bincount(index, minlength=math.prod(cells)) > 0
    split = held.reshape([n for pair in zip(counts, shape.rank, strict=True) for n in pair])
    return split.sum(tuple(range(1, 2 * shape.dims, 2))).reshape(-1).astype(np.int64)


def _sinks_of_blocks(shape: Geometry, sinks: int) -> Ints:
    """[blocks] sinks that lie in every leaf block."""
    places = np.unravel_index(np.arange(min(sinks, shape.tokens)), shape.grid)
    index = np.ravel_multi_index(tuple(x // m for x, m in zip(places, shape.block, strict=True)), shape.group_counts(1))
    return np.bincount(index, minlength=shape.blocks).astype(np.int64)


def _fused_blocks(part: Any, case: Case, near: Part | None) -> Work:
    return blocks(case, part.block)


def _pyramid(part: Any, case: Case, near: Part | None) -> Work:
    assert isinstance(near, Blocks)
    extra = blocks(case, near.block, part.sinks).exact - blocks(case, near.block).exact if part.sinks else 0
    return pyramid(case, part, near.block) + Work(exact=extra)


_COUNTS: dict[type, Callable[[Any, Case, Part | None], Work]] = {
    Dense: lambda part, case, near: dense(case),
    Blocks: _fused_blocks,
    Window: lambda part, case, near: window(case, *part.rule(case.grid)),
    Partition: lambda part, case, near: partition(case, part),
    GlobalQueries: lambda part, case, near: (
        # The network over the queries: a kernel of 3 per axis and a map of D x D per token.
        partition(case, Partition(part.size)) + Work(sums=case.tokens * 3**case.dims, products=case.tokens)
    ),
    Anchors: lambda part, case, near: anchors(case, part.every),
    DynamicConv: lambda part, case, near: Work(
        sums=case.tokens * (1 + math.prod(per_axis(part.kernel, case.dims, "kernel")))
    ),
    Conv: lambda part, case, near: Work(sums=case.tokens * math.prod(per_axis(part.kernel, case.dims, "kernel"))),
    Pyramid: _pyramid,
    Projection: lambda part, case, near: projection(case, part),
    Landmarks: lambda part, case, near: landmarks(case, part),
    Linear: lambda part, case, near: linear(case),
    Pooled: lambda part, case, near: pooled(case, part),
    Multigrid: lambda part, case, near: multigrid(case, part),
    Spectrum: lambda part, case, near: spectrum(case),
    Relay: lambda part, case, near: relay(case, part),
    # A D x D matrix of products over tokens, and its product with every value.
    Channels: lambda part, case, near: linear(case),
}
