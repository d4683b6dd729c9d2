"""Rotary position embedding in the half-split layout of Llama."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rope", "segment_positions"]


@dataclass(frozen=True)
class Rope:
    """Rotations by position: channel c and channel c + D/2 turn together by `position * theta ** (-2 c / D)`.

    Args:
        theta: base of the geometric sequence of wavelengths; 10000 in RoFormer (arXiv 2104.09864) and Llama.
    """

    theta: float = 10000.0

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise ValueError(f"Rope(theta={self.theta!r}): theta must be positive")

    def angles(self, positions: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[..., D/2]` in `dtype` for positions `[...]`; computed in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=wide) / dim
        turns = positions.to(wide).unsqueeze(-1) * self.theta**-exponents
        return turns.cos().to(dtype), turns.sin().to(dtype)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates every token of x by its position. O(N D).

        Args:
            x: `[B, H, N, D]`, D even.
            positions: `[N]` or `[B, N]`, integer or fractional (the centre of a cell).

        Returns:
            A tensor like x. Scores between rotated queries and keys depend on position differences only.

        Raises:
            ValueError: for an odd D, or positions that do not match x.
        """
        tokens, dim = x.shape[-2:]
        if dim % 2:
            raise ValueError(f"rotary embedding turns channels in pairs and needs an even head_dim, got {dim}")
        if positions.ndim not in (1, 2) or positions.shape[-1] != tokens:
            raise ValueError(f"positions must be [N] or [B, N] with N = {tokens}, got {tuple(positions.shape)}")
        cos, sin = self.angles(positions, dim, x.dtype)
        if positions.ndim == 2:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def segment_positions(tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Positions `[N]` that count from 0, and again from 0 in every packed segment."""
    index = torch.arange(tokens, device=device)
    if cu_seqlens is None:
        return index
    starts = cu_seqlens.to(device=device, dtype=index.dtype)
    return index - starts[torch.searchsorted(starts, index, right=True) - 1]
