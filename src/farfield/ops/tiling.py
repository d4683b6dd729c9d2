"""Tilings: a grid cut into tiles that share no token, and softmax attention inside each tile.

Two ways to cut an axis of n tokens into tiles of `size` places. *Contiguous*: neighbours lie together, the first
boundary `shift` tokens in. *Spread*: a tile holds every d-th token, d = ceil(n / size). Where the axis does not divide,
some places hold no token; nobody sees them. In n-D everything is the product over the axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from farfield.geometry import EMPTY
from farfield.ops.state import AttentionState, attend_dense

__all__ = ["Tiling", "attend_tiles", "cells_in_reach", "offsets", "pool_tiles", "tile_output", "tiling"]


@dataclass(frozen=True)
class Tiling:
    """A grid cut into tiles.

    Attributes:
        tiles: T, number of tiles.
        places: M, places of a tile, row-major over its axes.
        token: [T * M] the token of each place; places without one repeat token 0.
        place: [N] the place (in all tiles counted through) of each token.
        valid: bool [T, M], places that hold a token, or None when all do.
    """

    tiles: int
    places: int
    token: Tensor
    place: Tensor
    valid: Tensor | None

    def split(self, x: Tensor) -> Tensor:
        """`[B, H, N, ...]` to `[B * T, H, M, ...]`."""
        laid = x.index_select(2, self.token).unflatten(2, (self.tiles, self.places))
        return laid.transpose(1, 2).flatten(0, 1)

    def join(self, x: Tensor) -> Tensor:
        """`[B * T, H, M, ...]` back to `[B, H, N, ...]`."""
        laid = x.unflatten(0, (-1, self.tiles)).transpose(1, 2).flatten(2, 3)
        return laid.index_select(2, self.place)

    def seen(self, key_mask: Tensor | None) -> Tensor | None:
        """Bool `[B * T or T, M]`: places that may be seen as keys; None when all may be."""
        if key_mask is None:
            return self.valid
        laid = key_mask.index_select(1, self.token).unflatten(1, (self.tiles, self.places))
        return (laid if self.valid is None else laid & self.valid).flatten(0, 1)


def tiling(
    grid: tuple[int, ...],
    size: tuple[int, ...],
    shift: tuple[int, ...],
    spread: bool,
    device: torch.device,
    fixed: bool = False,
) -> Tiling:
    """The tiling for checked arguments. O(N); made of torch's arithmetic alone, so that it can be traced.

    Args:
        grid: lengths of the axes.
        size: places of a tile per axis. An axis that is not longer is one tile.
        shift: tokens before the first boundary per axis, 0 to size - 1; 0 for a boundary at the first token.
        spread: tiles of spread instead of neighbouring tokens.
        device: of the tensors.
        fixed: a short axis is cut where a longer one is, so that tiles do not depend on the length.
    """
    token = tile = place = torch.zeros(1, dtype=torch.int64, device=device)
    token, valid = token[None], torch.ones(1, 1, dtype=torch.bool, device=device)
    tiles = places = 1
    whole = True
    for length, most, first in zip(grid, size, shift, strict=True):
        side = most if fixed else min(most, length)
        own, index = torch.arange(side, device=device), torch.arange(length, device=device)
        if spread:
            count = -(-length // side)
            table = torch.arange(count, device=device)[:, None] + count * own
            of_tile, of_place = index % count, index // count
        else:
            # One tile over everything has no neighbour to exchange with.
            start = first - side if first > 0 and (fixed or side < length) else 0
            count = -(-(length - start) // side)
            table = start + side * torch.arange(count, device=device)[:, None] + own
            of_tile, of_place = (index - start) // side, (index - start) % side
        inside = (table >= 0) & (table < length)
        token = _outer(token * length, torch.where(inside, table, 0))
        valid = (valid[:, None, :, None] & inside[None, :, None, :]).flatten(2, 3).flatten(0, 1)
        tile = (tile[:, None] * count + of_tile).flatten()
        place = (place[:, None] * side + of_place).flatten()
        tiles, places, whole = tiles * count, places * side, whole and count * side == length
    return Tiling(
        tiles, places, torch.where(valid, token, 0).flatten(), tile * places + place, None if whole else valid
    )


def offsets(size: tuple[int, ...], sides: tuple[int, ...], device: torch.device) -> Tensor:
    """[M, M] number of the offset key place - query place in a table of prod(2 size - 1) entries.

    Args:
        size: places of a full tile per axis, for which the table is made.
        sides: places of the tile at hand, at most `size`.
        device: of the tensor.
    """
    total = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for most, side in zip(size, sides, strict=True):
        own = torch.arange(side, device=device)
        total = _outer(total * (2 * most - 1), own[None, :] - own[:, None] + most - 1)
    return total


def cells_in_reach(counts: tuple[int, ...], reach: tuple[int, ...], causal: bool, device: torch.device) -> Tensor:
    """[cells, prod(2 reach + 1)] the cells around each of a coarse grid, by rising offset, :data:`EMPTY` outside.

    Causal (1-D): only those before it.
    """
    number = torch.zeros(1, 1, dtype=torch.int64, device=device)
    valid = torch.ones(1, 1, dtype=torch.bool, device=device)
    for count, side in zip(counts, reach, strict=True):
        step = torch.arange(-side, side + 1, device=device)
        other = torch.arange(count, device=device)[:, None] + step
        inside = (other >= 0) & (other < count)
        if causal:
            inside = inside & (step < 0)
        number = _outer(number * count, torch.where(inside, other, 0))
        valid = (valid[:, None, :, None] & inside[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return torch.where(valid, number, EMPTY)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Sums of [a, b] and [c, d], as [a * c, b * d]."""
    return (a[:, None, :, None] + b[None, :, None, :]).flatten(2, 3).flatten(0, 1)


def attend_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Tiling,
    *,
    scale: float,
    bias: Tensor | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> AttentionState:
    """Softmax attention of every token over the tokens of its tile. O(N M) time and memory.

    Args:
        query: `[B, Hq, N, D]`.
        key: `[B, Hkv, N, D]`, Hkv divides Hq.
        value: `[B, Hkv, N, D]`.
        tiles: the tiling.
        scale: factor on the scores.
        bias: `[Hq, M, M]`, added to the scores.
        causal: a place sees itself and those before it (1-D).
        key_mask: bool `[B, N]`, True = visible.
        dropout: rate for the normalised weights.

    Returns:
        The state `[B, Hq, N, D]`, `[B, Hq, N]`.
    """
    seen = tiles.seen(key_mask)
    if seen is not None and key_mask is None:
        seen = seen.repeat(query.shape[0], 1)
    visible = None if seen is None else seen[:, None, None, :]
    if causal:
        order = torch.ones(tiles.places, tiles.places, dtype=torch.bool, device=key.device).tril()
        visible = order if visible is None else visible & order
    state = attend_dense(
        tiles.split(query),
        tiles.split(key),
        tiles.split(value),
        scale=scale,
        bias=bias,
        visible=visible,
        keep=(lambda weights: F.dropout(weights, dropout)) if dropout > 0 else None,
    )
    return AttentionState(tiles.join(state.out), tiles.join(state.lse))


def tile_output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Tiling,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """As :func:`attend_tiles` without a key mask and not causal, the output alone, by torch's fused kernels.

    A place without a token sees the tokens of its tile, of which there is at least one, so that no row is empty.
    """
    q = tiles.split(query)
    mask = None if bias is None else bias.to(q.dtype)[None]
    if tiles.valid is not None:
        seen = tiles.valid.repeat(query.shape[0], 1)[:, None, None, :]
        mask = seen if mask is None else mask.masked_fill(~seen, float("-inf"))
    groups = query.shape[1] // key.shape[1]
    k, v = (tiles.split(x.repeat_interleave(groups, 1) if groups > 1 else x) for x in (key, value))
    return tiles.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale))


def pool_tiles(x: Tensor, tiles: Tiling, key_mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """One vector per tile: the mean over its visible tokens, or a weighted sum.

    Args:
        x: `[B, H, N, D]`; what hidden tokens hold does not matter.
        tiles: the tiling.
        key_mask: bool `[B, N]`, tokens that take part, or None for all.
        weights: `[H, M, D]` factors on the mean's summands, or None for ones.

    Returns:
        `[B, H, T, D]`, 0 where a tile has no visible token. O(N).
    """
    laid = tiles.split(x)
    seen = tiles.seen(key_mask)
    if seen is None:
        pooled = laid.mean(2) if weights is None else (laid * weights).mean(2)
    else:
        seen = seen.repeat(x.shape[0], 1) if key_mask is None else seen
        laid = laid.masked_fill(~seen[:, None, :, None], 0.0)
        total = (laid if weights is None else laid * weights).sum(2)
        pooled = total / seen.sum(1).clamp(min=1)[:, None, None]
    return pooled.unflatten(0, (-1, tiles.tiles)).transpose(1, 2)
