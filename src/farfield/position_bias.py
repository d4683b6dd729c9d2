"""A learned bias by offset that rides in extra channels of queries and keys, so that any softmax takes it along."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["PositionBias", "places"]

SHORTEST = 4
"""Tokens of the shortest wave; each octave has one twice as long."""


class PositionBias(nn.Module):
    """A bias on scores that is a function of the offset between key and query, per head and per axis.

    b(offset) = sum over axes a and octaves o of c cos(w_o offset_a) + s sin(w_o offset_a), with waves of 4, 8, ...,
    2 ** (octaves + 1) tokens and learned c and s per head, axis and octave; all 0 at first. An offset of the longest
    wave has the bias of offset 0: give enough octaves to make it longer than the grid, or the reach of the near field.

    The cosine of a difference is an inner product, so the bias is part of the product of queries and keys once both
    have ``channels`` more: near fields, engines and masks need to know nothing of it, and a summary of keys carries the
    mean of their waves (by weights of its tokens, where those depend on the data), so that long waves reach the far
    field and short ones cancel in it. Values get as many zeros, which cost time and memory like channels of a head.

    Args:
        heads: query heads.
        dims: axes of the grid.
        octaves: waves per axis.

    Attributes:
        channels: how many a head has more: 2 * octaves * dims.
        weight: `[heads, dims, octaves, 2]`, c and s.

    Source: the product of sines and cosines is that of random Fourier features (Rahimi and Recht, 2007) with fixed
    waves; biases by offset as in Swin, arXiv 2103.14030, whose table is fixed to a tile.
    """

    def __init__(self, heads: int, dims: int, octaves: int) -> None:
        super().__init__()
        self.octaves = octaves
        self.channels = 2 * octaves * dims
        self.weight = nn.Parameter(torch.empty(heads, dims, octaves, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No bias."""
        nn.init.zeros_(self.weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, where: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values with ``channels`` more.

        Args:
            q: `[B, Hq, N, D]`.
            k, v: `[B, Hkv, N, D]`.
            where: integers `[N, dims]` or `[B, N, dims]`, the places of the tokens.
            scale: factor that scores will get; the bias is divided by it.
        """
        cos, sin = self._waves(where, self.weight.dtype)
        wave, turned = torch.cat((cos, sin), -1), torch.cat((-sin, cos), -1)
        # c cos(w(j - i)) + s sin(w(j - i)) = (c cos wi - s sin wi) cos wj + (c sin wi + s cos wi) sin wj
        c, s = self.weight.unbind(-1)
        both = [torch.cat((part, part), -1).flatten(1)[:, None] for part in (c, s)]
        own = both[0] * wave.flatten(-2).unsqueeze(-3) + both[1] * turned.flatten(-2).unsqueeze(-3)
        own = (own / scale).to(q.dtype).expand(*q.shape[:3], -1)
        shared = wave.flatten(-2).unsqueeze(-3).to(k.dtype).expand(*k.shape[:3], -1)
        spare = v.new_zeros(()).expand(*v.shape[:3], self.channels)
        return torch.cat((q, own), -1), torch.cat((k, shared), -1), torch.cat((v, spare), -1)

    def _waves(self, where: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[..., N, dims, octaves]`."""
        wide = torch.promote_types(dtype, torch.float32)
        lengths = SHORTEST * 2 ** torch.arange(self.octaves, device=where.device)
        # Whole tokens of a whole wave: exact at any length.
        angles = (where.unsqueeze(-1) % lengths).to(wide) * (2 * math.pi / lengths.to(wide))
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        """Heads, axes and octaves."""
        heads, dims = self.weight.shape[:2]
        return f"heads={heads}, dims={dims}, octaves={self.octaves}"


def places(grid: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers `[N, dims]`: the coordinates of every token of a grid, row-major."""
    axes = [torch.arange(n, device=device) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
