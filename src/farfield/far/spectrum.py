"""Spectrum: values filtered in Fourier space, a learned circular convolution over the whole grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farfield.geometry import per_axis
from farfield.parts import FarPart, Inputs, LayerSpec, Part, by_segment, repeat_heads

__all__ = ["Spectrum"]


@dataclass(frozen=True)
class Spectrum(FarPart):
    """Every channel of the values is multiplied by a learned filter in Fourier space: y = irfft(W rfft(v)).

    That is a circular convolution with the kernel irfft(W), of `size` lags per axis, so weights depend on position
    differences only, and not on queries and keys. On a grid of `size` it is the paper's; on another one the kernel
    keeps its lags, from -(size // 2) on, and wraps around where the grid is smaller. (The released code interpolates W
    instead, without the wrap of frequencies.) Hidden values count as 0. O(N log N) time, O(N) memory. Not causal-safe.

    Args:
        size: lags of the kernel per axis; one integer or one per axis.

    Source: GFNet, NeurIPS 2021, arXiv 2107.00645.
    """

    size: int | tuple[int, ...] = 14

    why_not_causal = "a circular convolution carries later tokens to earlier ones"
    why_no_state = "a filter weighs by position and has no scores"

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
        """Multiplications per channel for n tokens."""
        return "n·log n"

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """Raises ValueError when size does not fit the dimensions."""
        per_axis(self.size, spec.dims, "size")

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _Spectrum(per_axis(self.size, spec.dims, "size"), spec)


class _Spectrum(nn.Module):
    def __init__(self, size: tuple[int, ...], spec: LayerSpec) -> None:
        super().__init__()
        self.size = size
        half = (*size[:-1], size[-1] // 2 + 1)
        # Real and imaginary parts side by side, so that the layer can be cast to any dtype.
        self.filter = nn.Parameter(torch.empty(spec.num_kv_heads * spec.head_dim, *half, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the paper starts it."""
        nn.init.normal_(self.filter, std=0.02)

    def forward(self, inputs: Inputs) -> Tensor:
        """The filtered values `[B, Hq, N, D]`."""
        if inputs.cu_seqlens is not None:
            return by_segment(inputs, self.forward)
        v, grid = inputs.v, inputs.grid
        axes = tuple(range(-len(grid), 0))
        wide = torch.promote_types(v.dtype, torch.float32)
        with torch.autocast(v.device.type, enabled=False):
            planes = v.to(wide).transpose(2, 3).flatten(1, 2).unflatten(2, grid)
            made = torch.fft.rfftn(planes, dim=axes) * self._response(grid, wide)
            mixed = torch.fft.irfftn(made, s=grid, dim=axes).flatten(2).unflatten(1, (v.shape[1], v.shape[3]))
        return repeat_heads(mixed.transpose(2, 3).to(v.dtype), inputs.q.shape[1])

    def _response(self, grid: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The filter `[width, ..., n // 2 + 1]` on the frequencies of a grid."""
        filters = torch.view_as_complex(self.filter.to(dtype).contiguous())
        if grid == self.size:
            return filters
        axes = tuple(range(1, len(grid) + 1))
        kernel = torch.fft.irfftn(filters, s=self.size, dim=axes)
        for axis, (size, length) in enumerate(zip(self.size, grid, strict=True), start=1):
            place = torch.arange(size, device=kernel.device)
            lag = torch.where(place < size - size // 2, place, place - size) % length
            shape = [*kernel.shape[:axis], length, *kernel.shape[axis + 1 :]]
            kernel = kernel.new_zeros(shape).index_add(axis, lag, kernel)
        return torch.fft.rfftn(kernel, dim=axes)
