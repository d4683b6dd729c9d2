"""DynamicConv: a depthwise convolution of the values whose kernel the whole input chooses."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from farfield.geometry import per_axis
from farfield.parts import Inputs, LayerSpec, NearPart, Part, by_segment, repeat_heads

__all__ = ["DynamicConv"]


@dataclass(frozen=True)
class DynamicConv(NearPart):
    """A kernel per input and channel over the values around each token; zero outside the grid and at hidden tokens.

    The kernel is made from the mean of the visible tokens by two linear maps that are separate for every head, with a
    GELU between them. It weighs by position alone, so it has no softmax to share: merge it by "gate" or "sum". Linear
    time and memory. Not causal-safe.

    Args:
        kernel: tokens per axis; one odd integer or one per axis.

    Source: the local residual of InLine attention, NeurIPS 2024, arXiv 2412.06590.
    """

    kernel: int | tuple[int, ...] = 3

    why_not_causal = "its kernel is made from the mean of the whole sequence, later tokens included"
    why_no_state = "a convolution weighs by position and has no scores"

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
        return "n·kernel per axis"

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """Raises ValueError for a kernel without a middle, or a width that does not divide among the heads."""
        if any(size % 2 == 0 for size in per_axis(self.kernel, spec.dims, "kernel")):
            raise ValueError(f"kernel={self.kernel!r} has no middle; give odd integers")
        if spec.dim % spec.num_kv_heads:
            raise ValueError(
                f"DynamicConv makes each head's kernel from its own share of the input: dim={spec.dim} must be a "
                f"multiple of num_kv_heads={spec.num_kv_heads}"
            )

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _DynamicConv(per_axis(self.kernel, spec.dims, "kernel"), spec)


class _DynamicConv(nn.Module):
    def __init__(self, kernel: tuple[int, ...], spec: LayerSpec) -> None:
        super().__init__()
        self.kernel = kernel
        width, heads = spec.num_kv_heads * spec.head_dim, spec.num_kv_heads
        self.inner = nn.Conv1d(spec.dim, width, 1, groups=heads)
        self.outer = nn.Conv1d(width, width * prod(kernel), 1, groups=heads)

    def forward(self, inputs: Inputs) -> Tensor:
        """The convolved values `[B, Hq, N, D]`."""
        if inputs.cu_seqlens is not None:
            return by_segment(inputs, self.forward)
        v = inputs.v  # 0 at hidden tokens
        batch, width = v.shape[0], v.shape[1] * v.shape[3]
        planes = v.transpose(2, 3).reshape(1, batch * width, *inputs.grid)
        weights = self.kernels(inputs).reshape(batch * width, 1, *self.kernel)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(inputs.grid) - 1]
        padding = [size // 2 for size in self.kernel]
        mixed = conv(planes, weights, padding=padding, groups=batch * width)
        mixed = mixed.reshape(batch, v.shape[1], v.shape[3], -1).transpose(2, 3)
        return repeat_heads(mixed, inputs.q.shape[1])

    def kernels(self, inputs: Inputs) -> Tensor:
        """`[B, width, places]`, one kernel per input and channel."""
        if inputs.key_mask is None:
            mean = inputs.x.mean(1)
        else:
            shown = inputs.x.masked_fill(~inputs.key_mask[..., None], 0.0)
            mean = shown.sum(1) / inputs.key_mask.sum(1).clamp(min=1)[:, None]
        made: Tensor = self.outer(F.gelu(self.inner(mean[..., None])))
        return made.view(len(made), -1, prod(self.kernel))
