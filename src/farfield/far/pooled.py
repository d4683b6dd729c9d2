"""Pooled: keys and values pooled over the cells of a coarse grid, all of them or those around the query."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farfield.geometry import EMPTY, integers, per_axis
from farfield.ops.cache import Cache, attend_few, exactly, grown, join_rows, read_ring, write_ring
from farfield.ops.state import AttentionState, attend_dense
from farfield.ops.tiles import compute_dtype
from farfield.ops.tiling import Tiling, cells_in_reach, pool_tiles, tiling
from farfield.parts import FarPart, Inputs, LayerSpec, OutputModule, Part, by_segment, repeat_heads
from farfield.streaming import StreamModule, StreamSpec

__all__ = ["CellWeights", "Pooled"]

_SUMMARIES = ("mean", "learned")


@dataclass(frozen=True)
class Pooled(FarPart):
    """Each query sees one key and one value per cell of `cell` tokens per axis; causal: of cells before its own.

    Pooled are the keys and values of the visible tokens; a linear pooling and the layer's projection can be exchanged,
    so this is the projection of a pooled input. With `reach` a query sees the cells at most that far from its own, its
    own too, those inside the grid; without, all. O(N N / cell) time and memory without `reach`, O(N reach) with it, per
    axis. Causal-safe; a causal query in the first cell sees nothing here. Keys are used as they are before any rotary
    embedding.

    Args:
        cell: tokens of a cell per axis; one integer or one per axis. Cells at the end of an axis may be smaller.
        reach: cells to both sides, one integer or one per axis; None for all cells.
        summary: "mean", or "learned": a weight per place and channel that starts at the mean, for keys and values each
            (a depthwise convolution with kernel and stride `cell`; where tokens are missing it is rescaled).
        rank: compress queries and keys to this many channels per head for the scores, by learned maps; scores are then
            scaled by rank ** -0.5, and as a matrix have at most this rank. None for the channels as they are.
        bias: add a learned bias per head for every offset of cells. Needs `reach`.
        count_bias: add log(number of tokens) to the scores, so that a cell weighs as much as its tokens would.

    Source: focal attention, arXiv 2107.00641 (reach, bias); S2AFormer, arXiv 2505.22195 (rank); FlashVGGT,
    arXiv 2512.01540.
    """

    cell: int | tuple[int, ...]
    reach: int | tuple[int, ...] | None = None
    summary: str = "mean"
    rank: int | None = None
    bias: bool = False
    count_bias: bool = False

    takes_dropout = True

    def __post_init__(self) -> None:
        if self.summary not in _SUMMARIES:
            raise ValueError(f"Pooled(summary={self.summary!r}): known summaries are {', '.join(_SUMMARIES)}")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"Pooled(rank={self.rank!r}): rank must be a positive integer, or None")
        if self.bias and self.reach is None:
            raise ValueError("Pooled(bias=True) learns a bias per offset of cells, whose number reach= must bound")

    @property
    def takes_position_bias(self) -> bool:
        """Without rank, whose maps would mix the channels."""
        return self.rank is None

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        return "n·n/cell per axis" if self.reach is None else "n·(2·reach + 1) per axis"

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """Raises ValueError when cell or reach do not fit the dimensions."""
        per_axis(self.cell, spec.dims, "cell")
        self.reaches(spec.dims)

    def reaches(self, dims: int) -> tuple[int, ...] | None:
        """Cells to both sides per axis; None for all."""
        if self.reach is None:
            return None
        given = integers(self.reach, "reach")
        reaches = given if isinstance(self.reach, tuple) else given * dims
        if len(reaches) != dims or any(r < 0 for r in reaches):
            raise ValueError(f"reach={self.reach!r}: give one integer >= 0, or {dims} of them, one per axis")
        return reaches

    def tiling(self, grid: tuple[int, ...], device: torch.device) -> Tiling:
        """The cells of a grid."""
        dims = len(grid)
        return tiling(grid, per_axis(self.cell, dims, "cell"), (0,) * dims, False, device)

    def counts(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Cells per axis."""
        return tuple(-(-n // c) for n, c in zip(grid, per_axis(self.cell, len(grid), "cell"), strict=True))

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _Pooled(self, spec)


class CellWeights(nn.Module):
    """A weight per head, place of a cell and channel, relative to the mean: all ones at the start.

    Args:
        size: places of a full cell per axis.
        heads: heads of what is weighed.
        head_dim: channels per head.
        waves: of these, the last ones that are always averaged.
    """

    def __init__(self, size: tuple[int, ...], heads: int, head_dim: int, waves: int = 0) -> None:
        super().__init__()
        self.waves = waves
        self.weight = nn.Parameter(torch.empty(heads, *size, head_dim - waves))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The mean."""
        nn.init.ones_(self.weight)

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        """`[heads, M, head_dim]` for the M places of a cell of this grid, where a short axis has fewer."""
        places = tuple(slice(min(s, n)) for s, n in zip(self.weight.shape[1:-1], grid, strict=True))
        return F.pad(self.weight[(slice(None), *places)].flatten(1, -2), (0, self.waves), value=1.0)


class _Pooled(OutputModule, StreamModule):
    def __init__(self, part: Pooled, spec: LayerSpec) -> None:
        super().__init__()
        self.part = part
        cell, reach = per_axis(part.cell, spec.dims, "cell"), part.reaches(spec.dims)
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        learned = part.summary == "learned"
        self.key_weights = CellWeights(cell, kv_heads, dim, spec.waves) if learned else None
        self.value_weights = CellWeights(cell, kv_heads, dim, spec.waves) if learned else None
        self.query_map = self.key_map = None
        if part.rank is not None:
            self.query_map = nn.Parameter(torch.randn(heads, dim, part.rank) / math.sqrt(dim))
            self.key_map = nn.Parameter(torch.randn(kv_heads, dim, part.rank) / math.sqrt(dim))
        self.bias = None
        if part.bias and reach is not None:
            offsets = math.prod(2 * r + 1 for r in reach)
            self.bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, offsets), std=0.02))

    def forward(self, inputs: Inputs) -> AttentionState:
        """What the queries read from the cells they see."""
        if inputs.cu_seqlens is not None:
            return by_segment(inputs, self.forward)
        tiles = self.part.tiling(inputs.grid, inputs.q.device)
        query, keys, values, scale = self._compressed(inputs, tiles)
        seen = tiles.seen(inputs.key_mask)
        if seen is None:
            count = torch.full((1, tiles.tiles), tiles.places, device=query.device)
        else:
            count = seen.sum(1).view(-1, tiles.tiles)  # [B, T], or [1, T] without a key mask
        present = count > 0
        mass = count.clamp(min=1).to(torch.promote_types(query.dtype, torch.float32)).log()

        def keep(weights: Tensor) -> Tensor:
            return F.dropout(weights, inputs.dropout)

        drop = keep if inputs.dropout > 0 else None
        reach = self.part.reaches(len(inputs.grid))
        if reach is None:
            visible = present[:, None, None]
            if inputs.causal:
                own = tiles.place // tiles.places
                visible = visible & (torch.arange(tiles.tiles, device=own.device) < own[:, None])
            bias = mass[:, None, None] if self.part.count_bias else None
            return attend_dense(query, keys, values, scale=scale, bias=bias, visible=visible, keep=drop)
        table = cells_in_reach(self.part.counts(inputs.grid), reach, inputs.causal, query.device)
        index = table.clamp(min=0)

        def around(x: Tensor) -> Tensor:
            """`[B, H, T, ...]` of every cell to `[B * T, H, R, ...]`, those around each."""
            return x[:, :, index].transpose(1, 2).flatten(0, 1)

        batch = query.shape[0]
        visible = (present[:, index] & (table != EMPTY)).expand(batch, -1, -1).flatten(0, 1)[:, None, None]
        bias = None if self.bias is None else self.bias[:, None]
        if self.part.count_bias:
            of_cell = mass[:, index].expand(batch, -1, -1).flatten(0, 1)[:, None, None]
            bias = of_cell if bias is None else bias + of_cell
        state = attend_dense(
            tiles.split(query), around(keys), around(values), scale=scale, bias=bias, visible=visible, keep=drop
        )
        return AttentionState(tiles.join(state.out), tiles.join(state.lse))

    def output(self, inputs: Inputs) -> Tensor:
        """The output alone, by torch's fused kernels where every query sees every cell."""
        everything = inputs.cu_seqlens is None and inputs.key_mask is None and not inputs.causal
        if not everything or self.part.reach is not None or self.part.count_bias:
            return self(inputs).out
        query, keys, values, scale = self._compressed(inputs, self.part.tiling(inputs.grid, inputs.q.device))
        heads = query.shape[1]
        k, v = repeat_heads(keys, heads), repeat_heads(values, heads)
        return F.scaled_dot_product_attention(query, k, v, dropout_p=inputs.dropout, scale=scale)

    def _compressed(self, inputs: Inputs, tiles: Tiling) -> tuple[Tensor, Tensor, Tensor, float]:
        """Queries `[B, Hq, N, R]`, keys `[B, Hkv, T, R]` and values `[B, Hkv, T, D]` of the cells, scale."""
        grid = inputs.grid
        of_key = None if self.key_weights is None else self.key_weights(grid)
        of_value = None if self.value_weights is None else self.value_weights(grid)
        keys = pool_tiles(inputs.k, tiles, inputs.key_mask, of_key)
        values = pool_tiles(inputs.v, tiles, inputs.key_mask, of_value)
        if self.query_map is None or self.key_map is None or self.part.rank is None:
            return inputs.q, keys, values, inputs.scale
        return inputs.q @ self.query_map, keys @ self.key_map, values, self.part.rank**-0.5

    def _kept(self, rewind: int) -> tuple[int, int, int | None]:
        """Tokens of a cell, tokens kept of recent cells, cells kept; None where all of them are."""
        (cell,), reach = per_axis(self.part.cell, 1, "cell"), self.part.reaches(1)
        spare = -(-rewind // cell)
        return cell, cell * (1 + spare), None if reach is None else reach[0] + spare

    def empty_cache(self, spec: StreamSpec) -> Cache:
        """The present cell, earlier ones as far as tokens can be taken back, and the cells in reach, or all."""
        _, recent, cells = self._kept(spec.rewind)
        return {
            "keys": spec.zeros(recent),
            "values": spec.zeros(recent),
            "cell_keys": spec.zeros(cells or 0, self.part.rank),
            "cell_values": spec.zeros(cells or 0),
        }

    def reserve(self, cache: Cache, length: int, rewind: int) -> None:
        """Twice the room for cells when it is used up, where every one is kept."""
        cell, _, cells = self._kept(rewind)
        need, have = length // cell, cache["cell_keys"].shape[2]
        if cells is None and need > have:
            for name in ("cell_keys", "cell_values"):
                cache[name] = grown(cache[name], max(need, 2 * have))

    def step(self, inputs: Inputs, cache: Cache, length: int, rewind: int, need_lse: bool) -> AttentionState | Tensor:
        """See :class:`farfield.streaming.StreamModule`. O(T cells)."""
        cell, recent, _ = self._kept(rewind)
        tokens, done = inputs.q.shape[2], 0
        if length == 0 and tokens > 1:
            whole = tokens // cell * cell
            self._complete(cache, inputs.k[:, :, :whole], inputs.v[:, :, :whole], 0)
            write_ring(cache["keys"], inputs.k, 0)
            write_ring(cache["values"], inputs.v, 0)
            return self(inputs)
        query = inputs.q if self.query_map is None else inputs.q @ self.query_map
        scale = inputs.scale if self.part.rank is None else self.part.rank**-0.5
        states: list[AttentionState | Tensor] = []
        while done < tokens:
            own, place = divmod(length + done, cell)
            stop = min(tokens, done + cell - place)
            states.append(self._past(query[:, :, done:stop], cache, own, scale))
            for name, x in (("keys", inputs.k), ("values", inputs.v)):
                write_ring(cache[name], x[:, :, done:stop], length + done)
            if place + stop - done == cell:
                span = slice(own * cell % recent, own * cell % recent + cell)
                self._complete(cache, cache["keys"][:, :, span], cache["values"][:, :, span], own)
            done = stop
        return join_rows(states)

    def _past(self, query: Tensor, cache: Cache, own: int, scale: float) -> AttentionState | Tensor:
        """Queries of one cell over the cells before it."""
        reach = self.part.reaches(1)
        first = 0 if reach is None else max(0, own - reach[0])
        keys, values = (read_ring(cache[name], first, own) for name in ("cell_keys", "cell_values"))
        dtype = compute_dtype(values.dtype)
        bias = None
        if self.bias is not None and reach is not None:
            bias = self.bias[:, None, first - own + reach[0] : reach[0]].to(dtype)
        if self.part.count_bias:
            size = math.log(per_axis(self.part.cell, 1, "cell")[0])
            bias = query.new_full((1,), size, dtype=dtype) if bias is None else bias + size
        with exactly(query.device):
            return attend_few(query, keys, values, scale=scale, bias=bias, dtype=dtype)

    def _complete(self, cache: Cache, keys: Tensor, values: Tensor, first: int) -> None:
        """Pools whole cells [B, Hkv, cells * cell, D], the first of them number ``first``."""
        (cell,) = per_axis(self.part.cell, 1, "cell")
        for name, x, weights in (("keys", keys, self.key_weights), ("values", values, self.value_weights)):
            laid = x.unflatten(2, (-1, cell))
            pooled = (laid if weights is None else laid * weights((cell,))[:, None]).mean(3)
            if name == "keys" and self.key_map is not None:
                pooled = pooled @ self.key_map
            write_ring(cache[f"cell_{name}"], pooled.to(x.dtype), first)
