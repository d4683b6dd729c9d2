"""The three ways in which a near and a far field become one output.

A part that can meet a joint softmax returns an :class:`AttentionState`, see :mod:`farfield.ops.state`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from farfield.ops.state import AttentionState, attend_dense, merge_states, state_from_scores
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


class Merge:
    """What every merge declares; `build` gives a module called with (near, far, x).

    Attributes:
        needs_state: whether both parts must give attention states.
        reads_input: whether it needs x, the layer's input.
    """

    name: ClassVar[str]
    needs_state: ClassVar[bool]
    reads_input: ClassVar[bool] = False

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
    reads_input: ClassVar[bool] = True

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
