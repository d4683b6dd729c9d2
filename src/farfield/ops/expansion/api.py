"""Attention to everything far in one cell: the operator, its gradients, and the engine that takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from farfield.ops.cache import exactly
from farfield.ops.compiled.expansion import expand, expand_backward, takes
from farfield.ops.customop import differentiable_once
from farfield.ops.expansion.moments import nearest
from farfield.ops.expansion.torch import state_by_torch
from farfield.ops.state import AttentionState
from farfield.ops.tiles import compute_dtype

__all__ = ["expansion_state"]


def expansion_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centres: Tensor,
    bias: Tensor,
    *,
    block: int,
    key_mask: Tensor | None,
    scale: float,
    sinks: int,
    open: int = 0,
) -> AttentionState:
    """Attention of every query to all tokens beyond its near field of leaf blocks, in one cell. Causal, 1-D.

    Args:
        query: [B, H, N, D].
        key, value: [B, Hkv, N, D], Hkv divides H.
        centres: [H, C, D], what queries are expanded about (before the scale).
        bias: [H] added to the score.
        block, key_mask, scale, sinks: as in :func:`farfield.multipole_attention`.
        open: tokens that every centre keeps out of the cell, those with the largest scores at the centre; queries read
            those of their own centre exactly.

    Returns:
        The state: the value to first order and the score as lse, both in float32 or wider; 0 and -inf where nothing is
        far. With at least as many ``open`` as there are far tokens it is that of exact attention to them. O(N C D² + N
        C open / block) time; gradients, of queries, keys and values alone, compute the sums and the choice again
        instead of keeping them, and take what is kept as given. The compiled engine (float32 arithmetic on the CPU, D a
        multiple of 32) goes through the tokens once for every centre and keeps nothing else of size N; torch makes the
        tables of :func:`sift`, and has no gradients inside ``torch.func``'s transforms. No query depends on a later
        token. A value to first order is no mean: for a query far from all centres it can lie outside the range of the
        values.
    """
    # Autocast leaves rotated queries and keys in float32, and values not.
    common = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    query, key, value = (x.to(common) for x in (query, key, value))
    centres = centres.to(compute_dtype(common))
    if query.numel() == 0:
        return AttentionState(query.to(centres.dtype), query.new_zeros(query.shape[:3], dtype=centres.dtype))
    shown = torch.arange(query.shape[2], device=query.device)[None] >= sinks
    if key_mask is not None:
        shown = shown & key_mask
    with torch.no_grad(), exactly(query.device):
        own = nearest(query.to(centres.dtype), centres)
    open = min(open, query.shape[2])
    bias = bias.to(centres.dtype)
    return AttentionState(*_Expansion.apply(query, key, value, centres, bias, own, shown, block, open, scale))


class _Expansion(torch.autograd.Function):
    """Keeps what it was given and the lse: gradients go through the sums once more."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        centres: Tensor,
        bias: Tensor,
        own: Tensor,
        shown: Tensor,
        block: int,
        open: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        with exactly(query.device):
            if takes(query, centres.dtype):
                tensors = _for_compiled(query, key, value, centres, bias, own, shown)
                return expand(**tensors, block=block, open=open, scale=scale)
            return state_by_torch(query, key, value, centres, bias, own, shown, block, open, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.block, ctx.open, ctx.scale = inputs
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        grads = differentiable_once(
            lambda: _Expansion.gradients(ctx, *upstream), (*upstream, query, key, value),
            "Exact attention to what is far is to any order.",
        )  # fmt: skip
        return *grads, *[None] * 7

    @staticmethod
    def gradients(ctx: Any, *upstream: Tensor) -> Sequence[Tensor]:
        """Of query, key and value."""
        query, key, value, centres, bias, own, shown, lse = ctx.saved_tensors
        how = {"block": ctx.block, "open": ctx.open, "scale": ctx.scale}
        if takes(query, centres.dtype):
            tensors = _for_compiled(query, key, value, centres, bias, own, shown)
            found = expand_backward(*upstream, lse, **tensors, **how)
            return tuple(grad.to(x.dtype) for grad, x in zip(found, (query, key, value), strict=True))
        with torch.enable_grad(), exactly(centres.device):
            query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
            again = state_by_torch(query, key, value, centres, bias, own, shown, **how)
            return torch.autograd.grad(again, (query, key, value), upstream, materialize_grads=True)


def _for_compiled(
    query: Tensor, key: Tensor, value: Tensor, centres: Tensor, bias: Tensor, own: Tensor, shown: Tensor
) -> dict[str, Tensor]:
    q, k, v = (x.float() for x in (query, key, value))
    shown = shown.expand(len(q), -1)
    return {"query": q, "key": k, "value": v, "centres": centres, "bias": bias, "own": own, "shown": shown}
