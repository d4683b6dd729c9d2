"""What every near and far field declares, and what it is given.

A part is a frozen dataclass (so that it prints, compares and serialises) with a few declared properties and a `build`
that gives the module. The layer reads the properties when it is constructed, and refuses what makes no sense there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from farfield.ops.state import AttentionState
from farfield.rope import Rope

__all__ = [
    "FarPart",
    "Inputs",
    "LayerSpec",
    "NearPart",
    "OutputModule",
    "Part",
    "by_segment",
    "head_norm",
    "repeat_heads",
    "segment_bounds",
]


@dataclass(frozen=True)
class LayerSpec:
    """The layer that a part is built for.

    Attributes:
        dim: width of the layer's input x.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: channels per head.
        causal: whether token i may depend on tokens 0..i only.
        dims: 1 (sequence), 2 (image) or 3 (video, volume).
        waves: of the channels, the last ones that hold the waves of a position bias; a summary takes their means.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = False
    dims: int = 1
    waves: int = 0


@dataclass
class Inputs:
    """What the layer hands to its parts. Tokens lie in row-major order over the grid.

    Attributes:
        q: `[B, Hq, N, D]`, not rotated; D is the `head_dim` of the spec, the waves of a position bias included.
        k: `[B, Hkv, N, D]`, not rotated; 0 at hidden tokens, which is made so here.
        v: `[B, Hkv, N, D]`, as k.
        x: `[B, N, dim]`, the layer's input; finite at hidden tokens.
        grid: lengths of the axes; their product is N.
        causal: whether token i may depend on tokens 0..i only.
        key_mask: bool `[B, N]`, True = visible as a key, or None.
        cu_seqlens: `[S + 1]` from 0 to N, the bounds of packed segments (the same in every batch entry), or None.
            The layer drops a key_mask that comes with it.
        scale: factor on the scores.
        dropout: probability of dropping an attention weight; 0 in evaluation.
        rope: rotary embedding, or None.
        positions: `[N]` or `[B, N]`, for the rotation; restart in every packed segment. Not read without rope.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    grid: tuple[int, ...]
    causal: bool = False
    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    rope: Rope | None = None
    positions: Tensor | None = None
    _rotated_q: Tensor | None = field(default=None, init=False, repr=False)
    _rotated_k: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        # A weight of 0 does not keep a NaN out of a sum: what is hidden must hold nothing.
        if self.key_mask is not None:
            hidden = ~self.key_mask[:, None, :, None]
            self.k, self.v = self.k.masked_fill(hidden, 0.0), self.v.masked_fill(hidden, 0.0)

    @property
    def rotated_q(self) -> Tensor:
        """Queries after the rotary embedding, computed once; q itself without one."""
        if self.rope is None or self.positions is None:
            return self.q
        if self._rotated_q is None:
            self._rotated_q = self.rope.rotate(self.q, self.positions)
        return self._rotated_q

    @property
    def rotated_k(self) -> Tensor:
        """Keys after the rotary embedding, computed once; k itself without one."""
        if self.rope is None or self.positions is None:
            return self.k
        if self._rotated_k is None:
            self._rotated_k = self.rope.rotate(self.k, self.positions)
        return self._rotated_k


class Part:
    """A near or a far field. Subclasses are frozen dataclasses.

    Attributes:
        dims: dimensions in which the part works.
        causal_safe: whether, built with `causal=True`, no output depends on a later token.
        why_not_causal: the reason when it is not.
        gives_state: whether it returns an :class:`AttentionState` and so can meet a joint softmax.
        why_no_state: the reason when it does not.
        takes_dropout: whether it drops attention weights in training.
        takes_position_bias: whether its scores are products of queries with keys or means of keys, so that what further
            channels of both add to a product is a bias on the score.
        reads_input: whether it needs the layer's input x beside queries, keys and values.
        cost: score computations for n tokens, for tables, such as "n·w".
    """

    dims: ClassVar[tuple[int, ...]] = (1, 2, 3)
    takes_dropout: ClassVar[bool] = False
    reads_input: ClassVar[bool] = False
    why_not_causal: ClassVar[str] = "it reads later tokens"
    why_no_state: ClassVar[str] = "it has no sum of exponentials over tokens"

    @property
    def causal_safe(self) -> bool:
        """Whether no output depends on a later token when built causal."""
        return True

    @property
    def takes_position_bias(self) -> bool:
        """Whether further channels of queries and keys are a bias on its scores."""
        return False

    @property
    def gives_state(self) -> bool:
        """Whether the part returns an attention state."""
        return True

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        raise NotImplementedError

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """Raises ValueError with the reason when the part cannot work in this layer (beside this near field)."""

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """The module; its `forward(inputs: Inputs)` returns an AttentionState, or `[B, Hq, N, D]` without a state.

        It may be an :class:`OutputModule`.
        """
        raise NotImplementedError


class OutputModule(nn.Module):
    """The module of a part that has a faster way to its output when nobody needs the log-sum-exp.

    Optional: the layer calls `output` where the part stands alone, and `forward` of every other module.
    """

    def output(self, inputs: Inputs) -> Tensor:
        """`[B, Hq, N, D]`, equal to the `out` of what `forward(inputs)` returns."""
        raise NotImplementedError


class NearPart(Part):
    """A part that sees a query's own neighbourhood exactly."""


class FarPart(Part):
    """A part through which a query sees the rest."""

    def fuses(self, near: Part | None, merge: str) -> bool:
        """Whether this far field computes that near field and that merge together with itself, in one operator."""
        return False

    def build_fused(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """The module for near and far field together, where :meth:`fuses` says so."""
        raise TypeError(f"{self!r} computes no near field together with itself")


def repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """Key or value heads `[B, Hkv, ...]` repeated to `[B, heads, ...]`, each for its group of query heads."""
    groups = heads // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, 1)


def head_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A LayerNorm over the channels of all heads of `[B, H, N, D]`."""
    flat: Tensor = norm(x.transpose(1, 2).flatten(2))
    return flat.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2).to(x.dtype)


def segment_bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """(start, end) of every packed segment that holds a token. Reads the tensor on the host."""
    bounds = cu_seqlens.tolist()
    return [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


T = TypeVar("T", AttentionState, Tensor)


def by_segment(inputs: Inputs, run: Callable[[Inputs], T]) -> T:
    """Runs a 1-D part on every packed segment alone and puts the pieces side by side.

    Reads cu_seqlens on the host, so it cannot be traced into one graph.
    """
    assert inputs.cu_seqlens is not None
    pieces = []
    for start, end in segment_bounds(inputs.cu_seqlens):
        span = slice(start, end)
        piece = replace(
            inputs,
            q=inputs.q[:, :, span],
            k=inputs.k[:, :, span],
            v=inputs.v[:, :, span],
            x=inputs.x[:, span],
            grid=(end - start,),
            key_mask=None if inputs.key_mask is None else inputs.key_mask[:, span],
            cu_seqlens=None,
            positions=None if inputs.positions is None else inputs.positions[..., span],
        )
        pieces.append(run(piece))
    if isinstance(pieces[0], AttentionState):
        return AttentionState(torch.cat([p.out for p in pieces], 2), torch.cat([p.lse for p in pieces], 2))
    return torch.cat(pieces, 2)
