"""How many tiles a window touches: the best speed-up that a tiled kernel can have, counted without running one.

A kernel works on tiles: a tile of queries meets whole tiles of keys, also where only a few of them are visible. Tokens
are taken to lie tile by tile, axis by axis, so that tiles are boxes of the grid; a dilated axis is laid out residue by
residue first. Then everything is the product of what happens on the axes. The count is the simulator that generalized
neighborhood attention (arXiv 2504.16922) describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from farfield.geometry import Ints, per_axis
from farfield.ops.window.api import check_rule
from farfield.ops.window.plan import check_fit, strands_of, visible_places

__all__ = ["DEFAULT_TILES", "MOST_TILES", "Simulation", "simulate", "tile_map"]

DEFAULT_TILES = {1: ((128,), (128,)), 2: ((16, 16), (16, 8)), 3: ((4, 8, 8), (2, 8, 8))}
"""Tiles of queries and of keys by the number of axes."""

MOST_TILES = 4096
"""Tiles of queries or keys up to which a map of them is made."""


@dataclass(frozen=True)
class Simulation:
    """The tiles of one window pattern, per head.

    Attributes:
        grid, window, stride, dilation, causal, query_tile, key_tile: the pattern, per axis.
        query_tiles, key_tiles: how many there are.
        dense: pairs of a query tile and a key tile that attention without a window touches, in the same causal order.
        touched: pairs that the window touches.
        masked: touched pairs in which some query does not see some key, so that a mask is needed. The end of an axis
            inside a tile needs no mask here.
        scores: (query, key) pairs that the window wants.
        computed: scores of the touched tiles, padding included.
        dense_scores: pairs that attention without a window wants.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    query_tiles: int
    key_tiles: int
    dense: int
    touched: int
    masked: int
    scores: int
    computed: int
    dense_scores: int

    @property
    def useful(self) -> float:
        """Share of the computed scores that the window wants."""
        return self.scores / self.computed

    @property
    def speedup(self) -> float:
        """Dense tiles per touched tile: the best speed-up over a dense kernel with these tiles."""
        return self.dense / self.touched

    @property
    def bound(self) -> float:
        """Dense scores per wanted score: the speed-up that no tiling can exceed, up to padding."""
        return self.dense_scores / self.scores

    @property
    def perfect(self) -> bool:
        """Whether no tile needs a mask: the pattern is block-sparse as it stands."""
        return self.masked == 0

    def to_json(self) -> dict[str, Any]:
        """Fields and what follows from them."""
        more = ("useful", "speedup", "bound", "perfect")
        return {**asdict(self), **{name: getattr(self, name) for name in more}}


@dataclass(frozen=True)
class _Run:
    """One strand of an axis, per tile of queries: the keys that some query sees and those that all see."""

    places: int
    first: Ints
    last: Ints
    common_first: Ints
    common_last: Ints
    scores: int


def simulate(
    grid: Sequence[int],
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    query_tile: int | Sequence[int] | None = None,
    key_tile: int | Sequence[int] | None = None,
) -> Simulation:
    """Counts the tiles that a window touches.

    Args:
        grid: lengths of one to three axes.
        window, stride, dilation, causal: the pattern, as in :func:`farfield.ops.window.window_attention`.
        query_tile: tokens of a tile of queries, one integer or one per axis. Default :data:`DEFAULT_TILES`.
        key_tile: tokens of a tile of keys, likewise.

    Raises:
        ValueError: with what was given and what would be accepted.

    Complexity:
        O(sum of the lengths).
    """
    pattern = _checked(grid, window, stride, dilation, causal)
    axes, sizes, strides, steps, order = pattern
    dims = len(axes)
    default = DEFAULT_TILES[dims]
    of_query = default[0] if query_tile is None else per_axis(query_tile, dims, "query_tile")
    of_key = default[1] if key_tile is None else per_axis(key_tile, dims, "key_tile")
    rows, columns, dense, touched, full, scores, dense_scores = [], [], [], [], [], [], []
    for length, size, s, step, hidden, t, u in zip(axes, sizes, strides, steps, order, of_query, of_key, strict=True):
        runs = _runs(length, size, s, step, hidden, t)
        (whole,) = _runs(length, length, 1, 1, hidden, t)
        rows.append(sum(len(run.first) for run in runs))
        columns.append(sum(-(-run.places // u) for run in runs))
        touched.append(sum(_touched(run, u) for run in runs))
        full.append(sum(_full(run, u) for run in runs))
        scores.append(sum(run.scores for run in runs))
        dense.append(_touched(whole, u))
        dense_scores.append(whole.scores)
    return Simulation(
        *pattern,
        query_tile=of_query,
        key_tile=of_key,
        query_tiles=prod(rows),
        key_tiles=prod(columns),
        dense=prod(dense),
        touched=prod(touched),
        masked=prod(touched) - prod(full),
        scores=prod(scores),
        computed=prod(touched) * prod(of_query) * prod(of_key),
        dense_scores=prod(dense_scores),
    )


def tile_map(simulation: Simulation) -> npt.NDArray[np.int8]:
    """[query tiles, key tiles] 0 untouched, 1 touched with a mask, 2 wholly visible; tiles row-major in the grid.

    Raises:
        ValueError: for more than :data:`MOST_TILES` tiles.
    """
    most = max(simulation.query_tiles, simulation.key_tiles)
    if most > MOST_TILES:
        raise ValueError(f"{most:,} tiles cannot be drawn, at most {MOST_TILES:,}; give a smaller grid or larger tiles")
    some = full = np.ones((1, 1), dtype=bool)
    for axis, u in enumerate(simulation.key_tile):
        runs = _runs(
            simulation.grid[axis],
            simulation.window[axis],
            simulation.stride[axis],
            simulation.dilation[axis],
            simulation.causal[axis],
            simulation.query_tile[axis],
        )
        columns = [-(-run.places // u) for run in runs]
        axis_some, axis_full = (np.zeros((sum(len(r.first) for r in runs), sum(columns)), dtype=bool) for _ in range(2))
        row = column = 0
        for run, count in zip(runs, columns, strict=True):
            span = np.arange(count)
            rows = slice(row, row + len(run.first))
            begin, end = _full_span(run, u)
            seen = (span >= (run.first // u)[:, None]) & (span <= (run.last // u)[:, None])
            axis_some[rows, column : column + count] = seen
            axis_full[rows, column : column + count] = (span >= begin[:, None]) & (span < end[:, None])
            row, column = rows.stop, column + count
        some, full = np.kron(some, axis_some), np.kron(full, axis_full)
    return (some.astype(np.int8) + full.astype(np.int8)).astype(np.int8)


def _checked(
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    causal: bool | Sequence[bool],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """The pattern per axis, a window no longer than its axis."""
    axes = tuple(grid)
    if not 1 <= len(axes) <= 3 or any(n < 1 for n in axes):
        raise ValueError(f"grid={axes}: give one, two or three lengths, each >= 1")
    sizes, strides, steps = check_rule(window, stride, dilation, len(axes))
    order = (causal,) * len(axes) if isinstance(causal, bool) else tuple(causal)
    if len(order) != len(axes):
        raise ValueError(f"causal={causal!r}: give one bool, or {len(axes)} for a grid of {len(axes)} axes")
    check_fit(axes, None, sizes, steps, order)
    sizes = tuple(min(w, n) if d == 1 else w for w, n, d in zip(sizes, axes, steps, strict=True))
    return axes, sizes, tuple(min(s, w) for s, w in zip(strides, sizes, strict=True)), steps, order


def _runs(length: int, window: int, stride: int, dilation: int, causal: bool, tile: int) -> list[_Run]:
    """Every strand of an axis."""
    runs = []
    for _, _, places in strands_of(length, dilation, None):
        place = np.arange(places)
        low, high = visible_places(place, places, window, stride, causal)
        low = np.maximum(low, 0)
        starts = np.arange(0, places, tile)

        runs.append(
            _Run(
                places=places,
                first=np.minimum.reduceat(low, starts),
                last=np.maximum.reduceat(high, starts),
                common_first=np.maximum.reduceat(low, starts),
                common_last=np.minimum.reduceat(high, starts),
                scores=int((high - low + 1).sum()),
            )
        )
    return runs


def _touched(run: _Run, tile: int) -> int:
    """Pairs of tiles in which some query sees some key. What a tile of queries sees together has no gap."""
    return int((run.last // tile - run.first // tile + 1).sum())


def _full_span(run: _Run, tile: int) -> tuple[Ints, Ints]:
    """Per tile of queries, the first tile of keys that all of its queries see wholly, and the one after the last."""
    begin = -(-run.common_first // tile)
    last = run.common_last
    end = np.where(last == run.places - 1, -(-run.places // tile), (last + 1) // tile)
    return begin, np.maximum(end, begin)


def _full(run: _Run, tile: int) -> int:
    begin, end = _full_span(run, tile)
    return int((end - begin).sum())
