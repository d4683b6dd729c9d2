"""What streaming operators have in common: buffers of recent tokens, and attention of a few queries over a buffer.

A *cache* is a dict of tensors whose first axis is the batch. It is written in place, so a view of some of its rows is
a cache of those rows; only a tensor whose length hangs on what the tokens are is replaced by another. A *ring* is a
buffer [B, H, S, D] in which the token at position i lies at place i % S.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from farfield.ops.state import AttentionState

__all__ = ["Cache", "attend_few", "exactly", "grown", "join_rows", "read_ring", "room_for", "write_ring"]

Cache = dict[str, Tensor]


def write_ring(ring: Tensor, x: Tensor, start: int) -> None:
    """Writes the tokens x [B, H, T, D] at positions from ``start``; of more than the ring holds, the last. O(S)."""
    size = ring.shape[2]
    keep = min(x.shape[2], size)
    if keep == 0:
        return
    x, start = x[:, :, x.shape[2] - keep :], start + x.shape[2] - keep
    place = start % size
    first = min(keep, size - place)
    ring[:, :, place : place + first] = x[:, :, :first]
    if first < keep:
        ring[:, :, : keep - first] = x[:, :, first:]


def read_ring(ring: Tensor, start: int, stop: int) -> Tensor:
    """[B, H, stop - start, D] the tokens at those positions, in order; a view where they lie in one piece."""
    size = ring.shape[2]
    if stop <= start:
        return ring[:, :, :0]
    place, last = start % size, (stop - 1) % size
    if place <= last:
        return ring[:, :, place : last + 1]
    return torch.cat((ring[:, :, place:], ring[:, :, : last + 1]), 2)


def grown(buffer: Tensor, size: int, fill: float = 0.0, axis: int = 2) -> Tensor:
    """The buffer with room for ``size`` places on an axis, new ones filled; the same one where there is room."""
    missing = size - buffer.shape[axis]
    if missing <= 0:
        return buffer
    shape = list(buffer.shape)
    shape[axis] = missing
    # A normal tensor even in inference mode: later steps outside of it write here.
    with torch.inference_mode(False), torch.no_grad():
        return torch.cat((buffer, buffer.new_full(shape, fill)), axis)


def room_for(length: int, have: int) -> int:
    """Places to make where ``length`` are needed and ``have`` are there: a quarter to spare.

    What is copied is then O(1) per token, and what lies empty at most a quarter of what is used.
    """
    return max(length, have + have // 4)


def exactly(device: torch.device) -> AbstractContextManager[object]:
    """Turns autocast off where it is on: scores and sums need the range of float32."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def attend_few(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    dtype: torch.dtype,
    need_lse: bool = True,
) -> AttentionState | Tensor:
    """Attention of a few queries over one buffer, with few operations.

    Args:
        query: [B, Hq, T, D].
        key: [B, Hkv, M, D], finite where hidden; Hkv divides Hq. Not copied in its own dtype.
        value: [B, Hkv, M, Dv], likewise.
        scale: factor of the scores.
        bias: in ``dtype``, added to the scores, -inf where hidden; [B, 1 or Hq, 1 or T, M], or fewer axes.
        dtype: of the arithmetic.
        need_lse: without it torch's fused attention runs; then every query must see something.

    Returns:
        out [B, Hq, T, Dv] in the dtype of the query, and lse [B, Hq, T] where it is needed. A query that sees nothing
        gets 0 and -inf. O(T M).
    """
    batch, heads, tokens, width = query.shape
    if key.shape[2] == 0:
        out = query.new_zeros(batch, heads, tokens, value.shape[3])
        lse = out.new_full((batch, heads, tokens), -torch.inf, dtype=dtype)
        return AttentionState(out, lse) if need_lse else out
    key, value = key.to(dtype), value.to(dtype)
    # Query heads of one key head stand side by side as more queries, so that keys are not repeated.
    grouped = query.to(dtype).reshape(batch, key.shape[1], -1, width)
    if not need_lse:
        groups = heads // key.shape[1]
        if bias is not None and groups > 1:
            bias = bias.expand(batch, heads, tokens, -1).reshape(batch, key.shape[1], groups * tokens, -1)
        found = F.scaled_dot_product_attention(grouped, key, value, attn_mask=bias, scale=scale)
        return found.reshape(batch, heads, tokens, -1).to(query.dtype)
    scores = (grouped @ key.mT).view(batch, heads, tokens, -1)
    scores = scores.mul_(scale) if bias is None else torch.add(bias, scores, alpha=scale)
    # Where everything is hidden the peak is finite all the same, and weights are exp(-inf) = 0.
    peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights.view(batch, key.shape[1], -1, scores.shape[-1]) @ value).view(batch, heads, tokens, -1)
    # The peak itself adds 1 to the total of every query that sees anything.
    return AttentionState((out / total.clamp(min=1.0)).to(query.dtype), (total.log() + peak).squeeze(-1))


def join_rows(pieces: Sequence[AttentionState | Tensor]) -> AttentionState | Tensor:
    """The rows of several pieces, all states or all outputs, one after the other."""
    if len(pieces) == 1:
        return pieces[0]
    outs = torch.cat([p.out if isinstance(p, AttentionState) else p for p in pieces], 2)
    lses = [p.lse for p in pieces if isinstance(p, AttentionState)]
    return AttentionState(outs, torch.cat(lses, 2)) if lses else outs
