"""Landmarks: agent tokens, pooled queries through which all tokens exchange what they know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farfield.geometry import per_axis
from farfield.ops.state import AttentionState, attend_dense
from farfield.parts import FarPart, Inputs, LayerSpec, Part, by_segment

__all__ = ["Landmarks", "pool_tokens"]


@dataclass(frozen=True)
class Landmarks(FarPart):
    """Softmax attention twice: agents gather from all keys, queries read from the agents.

    The agents are means of the queries over cells of the grid, `count` per axis, as torch's adaptive average pooling
    cuts them: equal cells where count divides the axis, otherwise neighbours may share a token. The product of the
    two softmax matrices has rank at most the number of agents, and rows that sum to 1; it does not become exact
    attention when every token is an agent. Queries and keys are used as they are before any rotary embedding.
    O(N agents) time and memory. Not causal-safe. The log-sum-exp of the state is that over the agents. The positional
    biases of the paper, which fix the grid, are left out.

    Args:
        count: agents per axis; one integer or one per axis. An axis shorter than that has one agent per token.

    Source: Agent Attention, ECCV 2024, arXiv 2312.08874.
    """

    count: int | tuple[int, ...] = 7

    why_not_causal = "its agents are means of queries over the whole sequence, later tokens included"

    @property
    def causal_safe(self) -> bool:
        """Never."""
        return False

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        return "2·n·agents"

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """Raises ValueError when count does not fit the dimensions."""
        per_axis(self.count, spec.dims, "count")

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _Landmarks(per_axis(self.count, spec.dims, "count"))


class _Landmarks(nn.Module):
    def __init__(self, count: tuple[int, ...]) -> None:
        super().__init__()
        self.count = count

    def forward(self, inputs: Inputs) -> AttentionState:
        """What the queries read from the agents, and the log-sum-exp of their scores there."""
        if inputs.cu_seqlens is not None:
            return by_segment(inputs, self.forward)
        agents, present = pool_tokens(inputs.q, inputs.grid, self.count, inputs.key_mask)
        seen = None if inputs.key_mask is None else inputs.key_mask[:, None, None, :]
        gathered = attend_dense(agents, inputs.k, inputs.v, scale=inputs.scale, visible=seen)
        return attend_dense(inputs.q, agents, gathered.out, scale=inputs.scale, visible=present)


def pool_tokens(
    x: Tensor, grid: tuple[int, ...], count: tuple[int, ...], mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Means over at most `count` cells per axis, those of torch's adaptive average pooling.

    Cell i of c on an axis of n tokens holds tokens floor(i n / c) to ceil((i + 1) n / c) - 1. Where c does not divide
    n, neighbouring cells may share a token.

    Args:
        x: `[B, H, N, D]`.
        grid: lengths with product N.
        count: cells per axis; no axis gets more cells than tokens.
        mask: bool `[B, N]`, tokens that take part, or None for all. What the others hold, NaN too, does not matter.

    Returns:
        Means `[B, H, cells, D]`, 0 in a cell without tokens, and bool `[B, 1, 1, cells]` telling which cells have any
        (None without a mask).
    """
    cells = [min(c, n) for c, n in zip(count, grid, strict=True)]
    pools: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    pool = pools[len(grid) - 1]

    def mean(y: Tensor) -> Tensor:
        planes = y.transpose(2, 3).flatten(0, 1).unflatten(2, grid)
        pooled = pool(planes, cells).flatten(2)
        return pooled.view(*y.shape[:2], *pooled.shape[1:]).transpose(2, 3)

    if mask is None:
        return mean(x), None
    share = mean(mask[:, None, :, None].to(x.dtype))
    present = share > 0
    means = mean(x.masked_fill(~mask[:, None, :, None], 0.0)) / torch.where(present, share, torch.ones_like(share))
    return means, present.transpose(2, 3)
