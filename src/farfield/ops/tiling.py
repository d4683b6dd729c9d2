"""Tilings: a grid cut into tiles that share no token, and softmax attention inside each tile.

Two ways to cut an axis of n tokens into tiles of `size` places. *Contiguous*: neighbours lie together, the first
boundary `shift` tokens in. *Spread*: a tile holds every d-th token, d = ceil(n / size). Where the axis does not divide,
some places hold no token; nobody sees them. In n-D everything is the product over the axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from farfield.geometry import EMPTY, Ints
from farfield.ops.state import AttentionState, attend_dense

__all__ = ["Tiling", "attend_tiles", "axis_tiles", "offsets", "pool_tiles", "tile_output", "tiling"]


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


def axis_tiles(length: int, size: int, shift: int, spread: bool) -> Ints:
    """[tiles, size] tokens of every tile of one axis, :data:`EMPTY` at places without one."""
    places = np.arange(size)
    if spread:
        step = -(-length // size)
        table = np.arange(min(step, length))[:, None] + step * places
    else:
        # One tile over everything has no neighbour to exchange with.
        first = shift - size if shift > 0 and size < length else 0
        table = np.arange(first, length, size)[:, None] + places
    return np.where((table >= 0) & (table < length), table, EMPTY)


@lru_cache(maxsize=64)
def tiling(
    grid: tuple[int, ...], size: tuple[int, ...], shift: tuple[int, ...], spread: bool, device: torch.device
) -> Tiling:
    """The tiling for checked arguments; kept, since layers and steps ask for the same again.

    Args:
        grid: lengths of the axes.
        size: places of a tile per axis. An axis that is shorter is one tile.
        shift: tokens before the first boundary per axis, 0 to size - 1; 0 for a boundary at the first token.
        spread: tiles of spread instead of neighbouring tokens.
        device: of the tensors.
    """
    sides = [min(s, n) for s, n in zip(size, grid, strict=True)]
    tables = [axis_tiles(n, s, o, spread) for n, s, o in zip(grid, sides, shift, strict=True)]
    token = np.zeros((1, 1), dtype=np.int64)
    for table, length in zip(tables, grid, strict=True):
        joined = token[:, None, :, None] * length + table[None, :, None, :]
        empty = (token[:, None, :, None] == EMPTY) | (table[None, :, None, :] == EMPTY)
        token = np.where(empty, EMPTY, joined).reshape(len(token) * len(table), -1)
    valid = token != EMPTY
    place = np.empty(prod(grid), dtype=np.int64)
    place[token[valid]] = np.flatnonzero(valid.reshape(-1))
    # Kept tensors must serve later calls under autograd too.
    with torch.inference_mode(False):
        return Tiling(
            tiles=len(token),
            places=token.shape[1],
            token=torch.from_numpy(np.where(valid, token, 0).reshape(-1)).to(device),
            place=torch.from_numpy(place).to(device),
            valid=None if valid.all() else torch.from_numpy(valid).to(device),
        )


@lru_cache(maxsize=64)
def offsets(size: tuple[int, ...], sides: tuple[int, ...], device: torch.device) -> Tensor:
    """[M, M] number of the offset key place - query place in a table of prod(2 size - 1) entries.

    Args:
        size: places of a full tile per axis, for which the table is made.
        sides: places of the tile at hand, at most `size`.
        device: of the tensor.
    """
    total = np.zeros((1, 1), dtype=np.int64)
    for s, side in zip(size, sides, strict=True):
        ahead = np.arange(side)[None, :] - np.arange(side)[:, None] + s - 1
        joined = total[:, None, :, None] * (2 * s - 1) + ahead[None, :, None, :]
        total = joined.reshape(len(total) * side, -1)
    with torch.inference_mode(False):
        return torch.from_numpy(total).to(device)


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
