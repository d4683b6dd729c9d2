"""GlobalQueries: tiles whose keys are their own and whose queries come from the whole image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farfield.geometry import per_axis
from farfield.near.partition import TileBias
from farfield.ops.state import AttentionState
from farfield.ops.tiling import attend_tiles, tiling
from farfield.parts import Inputs, LayerSpec, NearPart, Part, by_segment

__all__ = ["GlobalQueries"]


@dataclass(frozen=True)
class GlobalQueries(NearPart):
    """Each token reads the keys and values of its tile with a query that all tiles share.

    The queries of all tokens are an image; a small convolutional network and a max-pooling make of it one of `size`
    places per axis, whose place (a, b) asks for every token at place (a, b) of a tile. So content of the whole image
    chooses what is read, and what is read is local. O(N size) time and memory. Not causal-safe. Keys are used as they
    are before any rotary embedding.

    The network is x + W SE(GELU(DW3(x))), a depthwise convolution of 3 tokens per axis and a squeeze-and-excitation to
    a quarter of the channels. The paper repeats network and pooling by 2 until the image has the size of a tile, which
    fixes the image; here the network comes once and one adaptive pooling follows, so that any grid works.

    Args:
        size: places of a tile per axis; one integer or one per axis. An axis that is not longer is one tile.
        bias: add a learned bias per head for every offset within a tile.

    Source: GCViT, ICML 2023, arXiv 2206.09959.
    """

    size: int | tuple[int, ...]
    bias: bool = True

    takes_dropout = True
    why_not_causal = "its queries are pooled from the whole sequence, later tokens included"

    @property
    def causal_safe(self) -> bool:
        """Never."""
        return False

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        return "n·size per axis"

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """Raises ValueError when size does not fit the dimensions."""
        per_axis(self.size, spec.dims, "size")

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _GlobalQueries(self, spec)


class _GlobalQueries(nn.Module):
    def __init__(self, part: GlobalQueries, spec: LayerSpec) -> None:
        super().__init__()
        self.size = per_axis(part.size, spec.dims, "size")
        self.bias = TileBias(self.size, spec.num_heads) if part.bias else None
        width = spec.num_heads * spec.head_dim
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spec.dims - 1]
        self.conv = layer(width, width, 3, padding=1, groups=width, bias=False)
        self.squeeze = nn.Linear(width, max(1, width // 4), bias=False)
        self.excite = nn.Linear(max(1, width // 4), width, bias=False)
        self.point = nn.Linear(width, width, bias=False)

    def forward(self, inputs: Inputs) -> AttentionState:
        """Attention with its log-sum-exp."""
        if inputs.cu_seqlens is not None:
            return by_segment(inputs, self.forward)
        tiles = tiling(inputs.grid, self.size, (0,) * len(inputs.grid), False, inputs.q.device)
        query = self.queries(inputs).index_select(2, tiles.place % tiles.places)
        return attend_tiles(
            query,
            inputs.k,
            inputs.v,
            tiles,
            scale=inputs.scale,
            bias=None if self.bias is None else self.bias(inputs.grid),
            key_mask=inputs.key_mask,
            dropout=inputs.dropout,
        )

    def queries(self, inputs: Inputs) -> Tensor:
        """The shared queries `[B, Hq, M, D]` of the M places of a tile."""
        q, grid, mask = inputs.q, inputs.grid, inputs.key_mask
        x = q.transpose(1, 2).flatten(2)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        mixed = F.gelu(self.conv(x.mT.unflatten(2, grid))).flatten(2).mT
        if mask is None:
            mean = mixed.mean(1, keepdim=True)
        else:
            shown = mixed.masked_fill(~mask[..., None], 0.0)
            mean = shown.sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]
        gate = self.excite(F.gelu(self.squeeze(mean))).sigmoid()
        x = x + self.point(mixed * gate)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], float("-inf"))
        pools: tuple[Callable[..., Tensor], ...] = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
        sides = [min(s, n) for s, n in zip(self.size, grid, strict=True)]
        pooled = pools[len(grid) - 1](x.mT.unflatten(2, grid), sides).flatten(2)
        # A cell whose tokens are all hidden asks nothing: its scores are those of a query of zeros.
        pooled = torch.where(pooled.isneginf(), torch.zeros_like(pooled), pooled)
        return pooled.mT.unflatten(2, (q.shape[1], q.shape[3])).transpose(1, 2)
