"""Relay: a few tokens per tile gather what it holds, exchange it with all other tiles, and hand it back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farfield.geometry import per_axis
from farfield.ops.state import AttentionState, attend_dense
from farfield.ops.tiling import pool_tiles, tiling
from farfield.parts import FarPart, Inputs, LayerSpec, Part, by_segment, repeat_heads

__all__ = ["Relay"]


@dataclass(frozen=True)
class Relay(FarPart):
    """Three softmaxes: relays read their tile, relays read all relays, each token reads the relays of its tile.

    A relay asks with the mean query of its tile and answers with the mean key, plus a learned offset each that tells
    the relays of a tile apart. What a token sees of another tile has passed through `count` vectors. The log-sum-exp of
    the state is that over the tile's relays. O(N count + tiles² count²) time, O(N size) memory per axis. Not
    causal-safe. Used are queries and keys before any rotary embedding.

    In the paper relays are tokens of the sequence that live through all layers, with adapted weights, and gather in
    one layer what they hand out in the next. A layer of this library keeps nothing from call to call, so relays are
    made from their tile and all three steps happen in one layer.

    Args:
        size: tokens of a tile per axis; one integer or one per axis.
        count: relays per tile.

    Source: RelayFormer, arXiv 2508.09459; relays as means of their tile as in HOTFormerLoc, CVPR 2025.
    """

    size: int | tuple[int, ...] = 16
    count: int = 3

    why_not_causal = "its relays carry later tokens to earlier tiles"

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"Relay(count={self.count!r}): count must be a positive integer")

    @property
    def causal_safe(self) -> bool:
        """Never."""
        return False

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        return "2·n·count + (tiles·count)²"

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """Raises ValueError when size does not fit the dimensions."""
        per_axis(self.size, spec.dims, "size")

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _Relay(self, spec)


class _Relay(nn.Module):
    def __init__(self, part: Relay, spec: LayerSpec) -> None:
        super().__init__()
        self.size, self.count = per_axis(part.size, spec.dims, "size"), part.count
        self.query_offset = nn.Parameter(torch.empty(spec.num_heads, 1, part.count, spec.head_dim))
        self.key_offset = nn.Parameter(torch.empty(spec.num_kv_heads, 1, part.count, spec.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small and different."""
        nn.init.trunc_normal_(self.query_offset, std=0.02)
        nn.init.trunc_normal_(self.key_offset, std=0.02)

    def forward(self, inputs: Inputs) -> AttentionState:
        """What the tokens read from the relays of their tile."""
        if inputs.cu_seqlens is not None:
            return by_segment(inputs, self.forward)
        tiles = tiling(inputs.grid, self.size, (0,) * len(inputs.grid), False, inputs.q.device)
        batch, heads = inputs.q.shape[:2]
        scale, mask = inputs.scale, inputs.key_mask
        query = pool_tiles(inputs.q, tiles, mask).unsqueeze(3) + self.query_offset  # B, Hq, T, count, D
        key = pool_tiles(inputs.k, tiles, mask).unsqueeze(3) + self.key_offset
        key = repeat_heads(key, heads)
        seen = tiles.seen(mask)
        if seen is not None and mask is None:
            seen = seen.repeat(batch, 1)

        def by_tile(x: Tensor) -> Tensor:
            """`[B, H, T, count, D]` to `[B * T, H, count, D]`."""
            return x.transpose(1, 2).flatten(0, 1)

        gathered = attend_dense(
            by_tile(query),
            tiles.split(inputs.k),
            tiles.split(inputs.v),
            scale=scale,
            visible=None if seen is None else seen[:, None, None],
        ).out
        value = gathered.unflatten(0, (batch, tiles.tiles)).transpose(1, 2).flatten(2, 3)
        # A tile whose tokens are all hidden has no relays.
        present = None if mask is None or seen is None else seen.any(1)
        everywhere = None
        if present is not None:
            everywhere = present.view(batch, -1).repeat_interleave(self.count, 1)[:, None, None]
        exchanged = attend_dense(query.flatten(2, 3), key.flatten(2, 3), value, scale=scale, visible=everywhere).out
        state = attend_dense(
            tiles.split(inputs.q),
            by_tile(key),
            by_tile(exchanged.unflatten(2, (-1, self.count))),
            scale=scale,
            visible=None if present is None else present[:, None, None, None],
        )
        return AttentionState(tiles.join(state.out), tiles.join(state.lse))
