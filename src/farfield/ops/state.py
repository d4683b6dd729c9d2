"""Attention states: a softmax over some keys in a form that merges with the softmax over others.

An :class:`AttentionState` is a normalised output and the natural log of its sum of exponentials. Two states over
disjoint sets of keys merge into the state over their union, associatively, so that near and far, levels, ranks of a
cluster and chunks of a stream are all combined by :func:`merge_states`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["AttentionState", "attend_dense", "merge_states", "state_from_scores"]


class AttentionState(NamedTuple):
    """The result of attending to some set of keys, in a form that merges with others.

    Attributes:
        out: `[B, H, N, D]`, the softmax-weighted mean of the values; 0 where nothing was seen.
        lse: `[B, H, N]`, natural log of the sum of exponentials, float32 or wider; -inf where nothing was seen.
    """

    out: Tensor
    lse: Tensor


def state_from_scores(scores: Tensor, value: Tensor, keep: Callable[[Tensor], Tensor] | None = None) -> AttentionState:
    """The attention state of explicit scores, safe on rows that see nothing.

    Args:
        scores: `[..., N, M]` in float32 or wider, -inf where a key is not visible.
        value: `[..., M, D]`.
        keep: optional map applied to the normalised weights before they meet the values (dropout).

    Returns:
        The state, `out` in the dtype of `value`. A row without a visible key gives 0 and -inf, and zero gradients.
    """
    peak = scores.detach().amax(-1, keepdim=True)
    peak = torch.where(peak == float("-inf"), torch.zeros_like(peak), peak)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    weights = weights / safe
    if keep is not None:
        weights = keep(weights)
    out = weights.to(value.dtype) @ value
    lse = torch.where(empty, torch.full_like(total, float("-inf")), safe.log() + peak)
    return AttentionState(out, lse.squeeze(-1))


def attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> AttentionState:
    """Softmax attention with its log-sum-exp, by the whole score matrix: O(N M) time and memory.

    Args:
        query: `[B, Hq, N, D]`.
        key: `[B, Hkv, M, D]`, Hkv divides Hq.
        value: `[B, Hkv, M, Dv]`.
        scale: factor on the scores.
        bias: added to the scores, broadcastable to `[B, Hq, N, M]`.
        visible: bool, True = seen, broadcastable to `[B, Hq, N, M]`.
        keep: optional map applied to the normalised weights (dropout).

    Returns:
        The state, `out` in the dtype of `value`. Scores are float32 (float64 for float64 inputs), under autocast too.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, 1)
        value = value.repeat_interleave(groups, 1)
    wide = torch.promote_types(query.dtype, torch.float32)
    # Scores need the range of float32: widened before the product, which autocast would narrow again.
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(wide) * scale @ key.to(wide).transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        return state_from_scores(scores, value, keep)


def merge_states(*states: AttentionState) -> AttentionState:
    """The state over the union of the disjoint key sets that the given states saw.

    Associative and commutative. Gradients flow through `out` and `lse`. Where every state is empty the result is 0 and
    -inf, and the gradients are 0, never NaN.

    Args:
        *states: one or more states of equal shape.

    Raises:
        ValueError: without any state, or when shapes differ.
    """
    if not states:
        raise ValueError("merge_states needs at least one attention state, got none")
    first = states[0]
    for state in states[1:]:
        if state.out.shape != first.out.shape or state.lse.shape != first.lse.shape:
            raise ValueError(
                "merge_states needs states of one shape, got "
                + ", ".join(f"out {tuple(s.out.shape)} lse {tuple(s.lse.shape)}" for s in states)
            )
    if len(states) == 1:
        return AttentionState(*first)
    lses = [state.lse for state in states]
    peak = lses[0].detach()
    for lse in lses[1:]:
        peak = torch.maximum(peak, lse.detach())
    peak = torch.where(peak == float("-inf"), torch.zeros_like(peak), peak)
    masses = [(lse - peak).exp() for lse in lses]
    total = torch.stack(masses).sum(0)
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    out = (masses[0] / safe).unsqueeze(-1) * first.out
    # Into the product, which no gradient needs: to get memory for a second one would take longer than all of this.
    for mass, state in zip(masses[1:], states[1:], strict=True):
        out = out.addcmul_((mass / safe).to(out.dtype).unsqueeze(-1), state.out.to(out.dtype))
    lse = torch.where(empty, torch.full_like(total, float("-inf")), safe.log() + peak)
    return AttentionState(out.to(first.out.dtype), lse)
