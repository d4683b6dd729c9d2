"""Anchors: a few whole frames that every query sees exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farfield.ops.cache import Cache, attend_few, exactly, grown, room_for
from farfield.ops.state import AttentionState, attend_dense
from farfield.ops.tiles import compute_dtype
from farfield.parts import Inputs, LayerSpec, NearPart, Part, by_segment
from farfield.streaming import StreamModule, StreamSpec

__all__ = ["Anchors"]


@dataclass(frozen=True)
class Anchors(NearPart):
    """Every query sees all tokens of frames 0, every, 2 every, ... of the first axis; causal: those up to itself.

    In a video a frame is an image, in an image a row, in a sequence one token. O(N anchors) time and memory.
    Causal-safe.

    Args:
        every: distance of two anchor frames.

    Source: the key frames of FlashVGGT, CVPR 2026, arXiv 2512.01540, there chosen by k-means, here evenly spaced.
    """

    every: int = 200

    takes_dropout = True

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"Anchors(every={self.every!r}): every must be a positive integer")

    @property
    def takes_position_bias(self) -> bool:
        """Always."""
        return True

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        return "n·n/every"

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _Anchors(self.every)


class _Anchors(StreamModule):
    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def forward(self, inputs: Inputs) -> AttentionState:
        """Attention with its log-sum-exp."""
        if inputs.cu_seqlens is not None:
            return by_segment(inputs, self.forward)
        tokens = inputs.q.shape[2]
        index = torch.arange(tokens, device=inputs.q.device).unflatten(0, (inputs.grid[0], -1))[:: self.every].flatten()
        visible = None if inputs.key_mask is None else inputs.key_mask[:, None, None, index]
        if inputs.causal:
            order = index <= torch.arange(tokens, device=index.device)[:, None]
            visible = order if visible is None else visible & order

        def keep(weights: Tensor) -> Tensor:
            return F.dropout(weights, inputs.dropout)

        return attend_dense(
            inputs.rotated_q,
            inputs.rotated_k[:, :, index],
            inputs.v[:, :, index],
            scale=inputs.scale,
            visible=visible,
            keep=keep if inputs.dropout > 0 else None,
        )

    def empty_cache(self, spec: StreamSpec) -> Cache:
        """All anchors: it grows with the context."""
        return {"keys": spec.zeros(0), "values": spec.zeros(0)}

    def reserve(self, cache: Cache, length: int, rewind: int) -> None:
        """A quarter more room when it is used up."""
        need, have = -(-length // self.every), cache["keys"].shape[2]
        if need > have:
            for name in cache:
                cache[name] = grown(cache[name], room_for(need, have))

    def step(self, inputs: Inputs, cache: Cache, length: int, rewind: int, need_lse: bool) -> AttentionState | Tensor:
        """See :class:`farfield.streaming.StreamModule`. O(T n / every)."""
        query, stop = inputs.rotated_q, length + inputs.q.shape[2]
        old, new = -(-length // self.every), -(-stop // self.every)
        chosen = slice(old * self.every - length, None, self.every)
        cache["keys"][:, :, old:new] = inputs.rotated_k[:, :, chosen]
        cache["values"][:, :, old:new] = inputs.v[:, :, chosen]
        if length == 0 and stop > 1:
            return self(inputs)
        keys, values = cache["keys"][:, :, :new], cache["values"][:, :, :new]
        dtype, bias = compute_dtype(keys.dtype), None
        if query.shape[2] > 1:  # one query sees everything
            anchor = torch.arange(new, device=query.device) * self.every
            hidden = anchor > torch.arange(length, stop, device=query.device)[:, None]
            bias = torch.zeros(hidden.shape, dtype=dtype, device=query.device).masked_fill_(hidden, -torch.inf)
        with exactly(query.device):
            return attend_few(query, keys, values, scale=inputs.scale, bias=bias, dtype=dtype, need_lse=need_lse)
