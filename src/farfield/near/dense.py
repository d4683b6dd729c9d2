"""Dense: every token sees every token exactly. The yardstick, and the limit of every other near field."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farfield.ops.cache import Cache, attend_few, exactly, grown, join_rows, room_for
from farfield.ops.state import AttentionState, attend_dense
from farfield.ops.tiles import compute_dtype
from farfield.parts import Inputs, LayerSpec, NearPart, OutputModule, Part, repeat_heads
from farfield.rope import segment_positions
from farfield.streaming import StreamModule, StreamSpec

__all__ = ["Dense", "DenseModule", "dense_output"]

SCORES = 1 << 24
"""Scores per head held at once when several tokens follow a cache."""


@dataclass(frozen=True)
class Dense(NearPart):
    """Exact softmax attention over all tokens, in 1-D, 2-D or 3-D (Vaswani et al., arXiv 1706.03762).

    Alone in a layer it is torch's `scaled_dot_product_attention`: O(N²) time, O(N) memory where torch has a fused
    kernel, O(N²) with a mask or packed segments. Beside a far field it keeps the log-sum-exp, at O(N²) memory.
    Causal-safe.
    """

    takes_dropout = True

    @property
    def takes_position_bias(self) -> bool:
        """Always."""
        return True

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        return "n²"

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return DenseModule()


class DenseModule(OutputModule, StreamModule):
    """What :class:`Dense` builds."""

    def forward(self, inputs: Inputs) -> AttentionState:
        """Attention with its log-sum-exp."""

        def keep(weights: Tensor) -> Tensor:
            return F.dropout(weights, inputs.dropout, training=True)

        visible = _visible(inputs)
        if inputs.causal and inputs.cu_seqlens is None:
            order = torch.ones(inputs.q.shape[2], inputs.q.shape[2], dtype=torch.bool, device=inputs.q.device).tril()
            visible = order if visible is None else visible & order
        return attend_dense(
            inputs.rotated_q,
            inputs.rotated_k,
            inputs.v,
            scale=inputs.scale,
            visible=visible,
            keep=keep if inputs.dropout > 0 else None,
        )

    def output(self, inputs: Inputs) -> Tensor:
        """The output alone, when nobody needs the log-sum-exp."""
        return dense_output(inputs)

    def empty_cache(self, spec: StreamSpec) -> Cache:
        """All keys and values: it grows with the context."""
        return {"keys": spec.zeros(0), "values": spec.zeros(0)}

    def reserve(self, cache: Cache, length: int, rewind: int) -> None:
        """A quarter more room when it is used up, so that copying costs O(1) per token."""
        have = cache["keys"].shape[2]
        if length > have:
            for name in cache:
                cache[name] = grown(cache[name], room_for(length, have))

    def step(self, inputs: Inputs, cache: Cache, length: int, rewind: int, need_lse: bool) -> AttentionState | Tensor:
        """See :class:`farfield.streaming.StreamModule`. O(T n)."""
        q, stop = inputs.rotated_q, length + inputs.q.shape[2]
        cache["keys"][:, :, length:stop] = inputs.rotated_k
        cache["values"][:, :, length:stop] = inputs.v
        if length == 0 and stop > 1:
            return self(inputs) if need_lse else self.output(inputs)
        span = max(1, SCORES // stop)
        parts = [
            _attend_cache(q[:, :, i : i + span], cache, min(length + i + span, stop), inputs.scale, need_lse)
            for i in range(0, q.shape[2], span)
        ]
        return join_rows(parts)


def _attend_cache(query: Tensor, cache: Cache, stop: int, scale: float, need_lse: bool) -> AttentionState | Tensor:
    """The last queries of a sequence of ``stop`` tokens over its cache."""
    keys, values = cache["keys"][:, :, :stop], cache["values"][:, :, :stop]
    tokens, dtype, bias = query.shape[2], compute_dtype(keys.dtype), None
    if not need_lse:
        dtype = keys.dtype  # torch's kernels take care of their range, and a long cache is not copied
    if tokens > 1:  # one query sees everything
        seen = torch.ones(tokens, stop, dtype=torch.bool, device=query.device).tril(stop - tokens)
        bias = torch.zeros(tokens, stop, dtype=dtype, device=query.device).masked_fill_(~seen, -torch.inf)
    with exactly(query.device):
        return attend_few(query, keys, values, scale=scale, bias=bias, dtype=dtype, need_lse=need_lse)


def dense_output(inputs: Inputs) -> Tensor:
    """Exact attention `[B, Hq, N, D]` over all tokens by torch's fused kernels; a row that sees nothing gives 0."""
    q = inputs.rotated_q
    k, v = repeat_heads(inputs.rotated_k, q.shape[1]), repeat_heads(inputs.v, q.shape[1])
    visible = _visible(inputs)
    causal = inputs.causal
    if visible is not None and causal and inputs.cu_seqlens is None:
        visible = visible & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    if visible is not None:
        causal = False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, dropout_p=inputs.dropout, is_causal=causal, scale=inputs.scale
    )
    if visible is not None and inputs.cu_seqlens is None:
        # Kernels differ on rows that see nothing: some give 0, some the mean of all values.
        out = torch.where(visible.any(-1, keepdim=True), out, torch.zeros_like(out))
    return out


def _visible(inputs: Inputs) -> Tensor | None:
    """Bool mask broadcastable to [B, H, N, N]; segments carry the causal order with them, key masks do not."""
    if inputs.cu_seqlens is not None:
        tokens, device = inputs.q.shape[2], inputs.q.device
        index = torch.arange(tokens, device=device)
        start = index - segment_positions(tokens, inputs.cu_seqlens, device)
        visible = start[:, None] == start[None, :]
        return visible & (index[:, None] >= index[None, :]) if inputs.causal else visible
    if inputs.key_mask is not None:
        return inputs.key_mask[:, None, None, :]
    return None
