"""Conv: a depthwise convolution over the values, the local half of agent attention and its kin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farfield.geometry import per_axis
from farfield.ops.cache import Cache, read_ring, write_ring
from farfield.ops.state import AttentionState
from farfield.parts import Inputs, LayerSpec, NearPart, Part, by_segment, repeat_heads
from farfield.streaming import StreamModule, StreamSpec

__all__ = ["Conv"]


@dataclass(frozen=True)
class Conv(NearPart):
    """A learned kernel per channel over the values around each token; zero outside the grid and at hidden tokens.

    Causal it reads the token and those before it. It weighs by position alone, so it has no softmax to share: merge it
    by "gate" or "sum". Linear time and memory. Causal-safe.

    Args:
        kernel: tokens per axis; one odd integer or one per axis (any integer when causal).

    Source: as the local part of Agent Attention, arXiv 2312.08874.
    """

    kernel: int | tuple[int, ...] = 3

    why_no_state = "a convolution weighs by position and has no scores"

    @property
    def gives_state(self) -> bool:
        """Never."""
        return False

    @property
    def cost(self) -> str:
        """Multiplications per channel for n tokens."""
        return "n·kernel per axis"

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """Raises ValueError for a kernel that does not fit the dimensions, or an even one that is not causal."""
        sizes = per_axis(self.kernel, spec.dims, "kernel")
        if not spec.causal and any(size % 2 == 0 for size in sizes):
            raise ValueError(f"kernel={self.kernel!r} has no middle; give odd integers, or causal=True")

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _Conv(per_axis(self.kernel, spec.dims, "kernel"), spec)


class _Conv(StreamModule):
    def __init__(self, kernel: tuple[int, ...], spec: LayerSpec) -> None:
        super().__init__()
        width = spec.num_kv_heads * spec.head_dim
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spec.dims - 1]
        self.conv = layer(width, width, kernel, groups=width)  # type: ignore[arg-type]
        pads = [(size - 1, 0) if spec.causal else (size // 2, size // 2) for size in kernel]
        self.padding = [side for pad in reversed(pads) for side in pad]

    def forward(self, inputs: Inputs) -> Tensor:
        """The convolved values `[B, Hq, N, D]`."""
        if inputs.cu_seqlens is not None:
            return by_segment(inputs, self.forward)
        v = inputs.v  # 0 at hidden tokens
        planes = v.transpose(2, 3).flatten(1, 2).unflatten(2, inputs.grid)
        mixed = self.conv(F.pad(planes, self.padding)).flatten(2).unflatten(1, (v.shape[1], v.shape[3]))
        return repeat_heads(mixed.transpose(2, 3), inputs.q.shape[1])

    def empty_cache(self, spec: StreamSpec) -> Cache:
        """As many values as the kernel reaches back, and those that can be taken back."""
        return {"values": spec.zeros(self.conv.kernel_size[0] - 1 + spec.rewind)}

    def step(self, inputs: Inputs, cache: Cache, length: int, rewind: int, need_lse: bool) -> AttentionState | Tensor:
        """See :class:`farfield.streaming.StreamModule`."""
        ring, v = cache["values"], inputs.v
        reach = self.conv.kernel_size[0] - 1
        before = read_ring(ring, max(0, length - reach), length).to(v.dtype)
        context = F.pad(torch.cat((before, v), 2), (0, 0, reach - before.shape[2], 0))
        write_ring(ring, v, length)
        mixed = self.conv(context.transpose(2, 3).flatten(1, 2)).unflatten(1, (v.shape[1], v.shape[3]))
        return repeat_heads(mixed.transpose(2, 3), inputs.q.shape[1])
