"""Multigrid: windows over ever coarser copies of the grid, each with its own softmax, added from coarse to fine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farfield.far.pooled import CellWeights
from farfield.geometry import per_axis
from farfield.ops.tiling import Tiling, pool_tiles, tiling
from farfield.ops.window import window_attention
from farfield.parts import FarPart, Inputs, LayerSpec, Part, by_segment

__all__ = ["Multigrid", "coarse_grids"]

_SAMPLINGS = ("mean", "learned")


@dataclass(frozen=True)
class Multigrid(FarPart):
    """Attention in windows of `size` cells per axis on grids that are `rate`, `rate`², ... times as coarse.

    Level l holds queries, keys and values pooled over cells of `rate` ** l tokens per axis, O_l its attention in
    windows of cells that share no softmax with other levels. From the coarsest of L levels on,
    R_l = O_l + R_(l+1) / (L - l), spread over the cells; the output is R_1 / L spread over the tokens. Beside the
    tokens' own windows, merged by "sum", level l arrives scaled by (L - l)! / L!: coarse levels fade. O(N size) time
    and memory for all levels together. Not causal-safe. Used are queries and keys before any rotary embedding.

    In the paper's sources one convolution that mixes channels makes the coarse input, on which projections act again.
    Here pooling acts on queries, keys and values, each with weights per channel that all levels share. With "mean" the
    two are the same.

    Args:
        size: cells of a window per axis; one integer or one per axis.
        rate: cells per axis that become one on the next level; one integer or one per axis.
        levels: coarse levels; None for as many as it takes until one window holds a whole grid. What a short input
            cannot have is left out.
        sampling: "mean" (and equal shares on the way back), or "learned", which starts there.

    Source: MANO, arXiv 2507.02748. The relation to the multipole method is in the levels only: cells near a query are
    seen on every level, so that the tokens are not divided among them.
    """

    size: int | tuple[int, ...] = 7
    rate: int | tuple[int, ...] = 2
    levels: int | None = None
    sampling: str = "mean"

    why_not_causal = "its coarse queries are means of tokens, later ones included"
    why_no_state = "every level has a softmax of its own, so there is no one sum of exponentials"

    def __post_init__(self) -> None:
        if self.sampling not in _SAMPLINGS:
            raise ValueError(f"Multigrid(sampling={self.sampling!r}): known samplings are {', '.join(_SAMPLINGS)}")
        if self.levels is not None and (
            isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 1
        ):
            raise ValueError(f"Multigrid(levels={self.levels!r}): levels must be a positive integer, or None")

    @property
    def causal_safe(self) -> bool:
        """Never."""
        return False

    @property
    def gives_state(self) -> bool:
        """Never."""
        return False

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        return "n/rate·size per axis on level 1, and so on"

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """Raises ValueError when size or rate do not fit the dimensions, or nothing would become coarser."""
        per_axis(self.size, spec.dims, "size")
        if max(per_axis(self.rate, spec.dims, "rate")) == 1:
            raise ValueError(f"rate={self.rate!r} makes nothing coarser; give 2 or more on some axis")

    def grids(self, grid: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The grids of levels 1, 2, ... over this one."""
        dims = len(grid)
        return coarse_grids(grid, per_axis(self.size, dims, "size"), per_axis(self.rate, dims, "rate"), self.levels)

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _Multigrid(self, spec)


def coarse_grids(
    grid: tuple[int, ...], size: tuple[int, ...], rate: tuple[int, ...], levels: int | None
) -> list[tuple[int, ...]]:
    """The grids of levels 1, 2, ...: up to `levels`, or without it until one window holds a grid; none if it does."""
    grids: list[tuple[int, ...]] = []
    while True:
        whole = all(n <= s for n, s in zip(grid, size, strict=True))
        coarser = tuple(-(-n // r) for n, r in zip(grid, rate, strict=True))
        if coarser == grid or (whole if levels is None else len(grids) == levels):
            return grids
        grids.append(coarser)
        grid = coarser


class _Multigrid(nn.Module):
    def __init__(self, part: Multigrid, spec: LayerSpec) -> None:
        super().__init__()
        self.part = part
        self.size, self.rate = per_axis(part.size, spec.dims, "size"), per_axis(part.rate, spec.dims, "rate")
        self.down = self.up = None
        if part.sampling == "learned":
            heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
            self.down = nn.ModuleList(CellWeights(self.rate, h, dim) for h in (heads, kv_heads, kv_heads))
            self.up = CellWeights(self.rate, heads, dim)

    def forward(self, inputs: Inputs) -> Tensor:
        """The sum of all coarse levels `[B, Hq, N, D]`, 0 for an input without any."""
        if inputs.cu_seqlens is not None:
            return by_segment(inputs, self.forward)
        grid, mask = inputs.grid, inputs.key_mask
        layers = (inputs.q, inputs.k, inputs.v)
        cells: list[tuple[Tiling, tuple[int, ...]]] = []
        outs: list[Tensor] = []
        for coarser in self.part.grids(grid):
            tiles = tiling(grid, self.rate, (0,) * len(grid), False, inputs.q.device)
            # A mean of means weighs a cell of few visible tokens like a full one, as the method does.
            weights = (None,) * 3 if self.down is None else [made(grid) for made in self.down]
            q, k, v = (pool_tiles(x, tiles, mask, w) for x, w in zip(layers, weights, strict=True))
            layers = (q, k, v)
            if mask is not None:
                seen = tiles.seen(mask)
                assert seen is not None
                mask = seen.any(1).view(-1, tiles.tiles)
            cells.append((tiles, grid))
            grid = coarser
            outs.append(
                window_attention(
                    q, k, v, window=self.size, stride=self.size, grid=grid, key_mask=mask, scale=inputs.scale
                )
            )
        if not outs:
            return torch.zeros_like(inputs.q)
        total = outs[-1]
        for level in range(len(outs) - 1, 0, -1):
            total = outs[level - 1] + self._spread(total, *cells[level]) / (len(outs) - level)
        return self._spread(total, *cells[0]) / len(outs)

    def _spread(self, coarse: Tensor, tiles: Tiling, grid: tuple[int, ...]) -> Tensor:
        """`[B, H, T, D]` of the cells to `[B, H, N, D]` of what they hold."""
        fine = coarse.index_select(2, tiles.place // tiles.places)
        if self.up is None:
            return fine
        weights: Tensor = self.up(grid)
        return fine * weights.index_select(1, tiles.place % tiles.places)
