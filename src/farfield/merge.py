"""Attention states, and the three ways in which a near and a far field become one output.

A part that can meet a joint softmax returns an :class:`AttentionState`: its normalised output and the natural log of
its sum of exponentials. Two states over disjoint sets of keys merge into the state over their union, associatively, so
that near and far, levels, ranks of a cluster and chunks of a stream are all combined by :func:`merge_states`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from farfield.parts import LayerSpec

__all__ = [
    "MERGES",
    "AttentionState",
    "Gate",
    "Merge",
    "Softmax",
    "Sum",
    "attend_dense",
    "merge_states",
    "resolve_merge",
    "state_from_scores",
]


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
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, 1)
        value = value.repeat_interleave(groups, 1)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query * scale @ key.transpose(-1, -2)).to(wide)
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
    out = sum(((mass / safe).unsqueeze(-1) * state.out for mass, state in zip(masses, states, strict=True)), start=0.0)
    assert isinstance(out, Tensor)
    lse = torch.where(empty, torch.full_like(total, float("-inf")), safe.log() + peak)
    return AttentionState(out.to(first.out.dtype), lse)


class Merge:
    """What every merge declares; `build` gives a module called with (near, far, x)."""

    name: ClassVar[str]
    needs_state: ClassVar[bool]

    def build(self, spec: LayerSpec) -> nn.Module:
        """The module whose `forward(near, far, x)` returns `[B, H, N, D]`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Softmax(Merge):
    """One joint softmax over the keys of both parts, by log-sum-exp; both must give attention states. No parameters."""

    name: ClassVar[str] = "softmax"
    needs_state: ClassVar[bool] = True

    def build(self, spec: LayerSpec) -> nn.Module:
        """See :class:`Merge`."""
        return _SoftmaxMerge()


@dataclass(frozen=True)
class Gate(Merge):
    """A learned convex mixture, `(1 - g) * near + g * far` with `g = sigmoid(W x + b)` for every token.

    Args:
        per: "head" (one gate per token and head) or "channel" (one per token, head and channel).
        start: b at the start, with W = 0. The default -2 opens the far field by 12 %, so that it starts quiet.
    """

    per: str = "head"
    start: float = -2.0
    name: ClassVar[str] = "gate"
    needs_state: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.per not in ("head", "channel"):
            raise ValueError(f"Gate(per={self.per!r}): per must be 'head' or 'channel'")

    def build(self, spec: LayerSpec) -> nn.Module:
        """See :class:`Merge`."""
        return _GateMerge(spec.dim, spec.num_heads, spec.head_dim if self.per == "channel" else 1, self.start)


@dataclass(frozen=True)
class Sum(Merge):
    """The plain sum of both outputs, each normalised on its own. No parameters."""

    name: ClassVar[str] = "sum"
    needs_state: ClassVar[bool] = False

    def build(self, spec: LayerSpec) -> nn.Module:
        """See :class:`Merge`."""
        return _SumMerge()


MERGES: dict[str, type[Merge]] = {"softmax": Softmax, "gate": Gate, "sum": Sum}


def resolve_merge(merge: str | Merge) -> Merge:
    """The merge of a name, or the given one itself.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything that is neither a name nor a merge.
    """
    if isinstance(merge, Merge):
        return merge
    if not isinstance(merge, str):
        raise TypeError(f"merge must be one of {sorted(MERGES)} or a merge such as Gate(per='channel'), got {merge!r}")
    if merge not in MERGES:
        raise ValueError(f"unknown merge {merge!r}; known merges: {', '.join(sorted(MERGES))}")
    return MERGES[merge]()


def _output(part: Tensor | AttentionState) -> Tensor:
    return part.out if isinstance(part, AttentionState) else part


class _SoftmaxMerge(nn.Module):
    def forward(self, near: AttentionState, far: AttentionState, x: Tensor) -> Tensor:
        return merge_states(near, far).out


class _SumMerge(nn.Module):
    def forward(self, near: Tensor | AttentionState, far: Tensor | AttentionState, x: Tensor) -> Tensor:
        total: Tensor = _output(near) + _output(far)
        return total


class _GateMerge(nn.Module):
    def __init__(self, dim: int, num_heads: int, channels: int, start: float) -> None:
        super().__init__()
        self.num_heads, self.channels, self.start = num_heads, channels, start
        self.gate = nn.Linear(dim, num_heads * channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every token opens the far field equally at the start."""
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, self.start)

    def forward(self, near: Tensor | AttentionState, far: Tensor | AttentionState, x: Tensor) -> Tensor:
        near, far = _output(near), _output(far)
        gate = self.gate(x).sigmoid().unflatten(-1, (self.num_heads, self.channels)).transpose(1, 2)
        mixed: Tensor = near + gate.to(near.dtype) * (far - near)
        return mixed
