"""Rows of causal attention whose keys were there before: decoding with a key-value cache, and prefill in chunks."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from farfield.attention import ReadyAttention
from farfield.far import ByHead, Pyramid
from farfield.interop.transformers.padding import align, aligned
from farfield.interop.transformers.streams import ARGUMENT
from farfield.near import Blocks, Dense, Window
from farfield.ops.multipole import multipole_rows
from farfield.parts import Inputs, repeat_heads

__all__ = ["dense_rows", "last_rows"]

BAND = 256
"""Queries of a window that are computed together."""


def last_rows(core: ReadyAttention, inputs: Inputs) -> Tensor:
    """What a prefill of all keys would give for the queries, the last tokens: `[B, Hq, Nq, D]`.

    Dense costs O(Nq Nk); windows O(Nq window); blocks and fma O(Nk) to read keys and values once for their summaries
    and O(Nq (block + rank log Nk)) scores; any other recipe computes all rows. Queries of a layer that is not causal
    may belong to another sequence (dense only).

    Raises:
        ValueError: for dropout, more queries than keys, and cells opened by a choice that queries share.
    """
    near, far = core.near_spec, core.far_spec
    if inputs.dropout:
        raise ValueError(f"dropout={inputs.dropout} with a cache of keys: train with use_cache=False")
    if isinstance(near, Dense) and far is None:
        return dense_rows(inputs)
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    if queries > keys:
        raise ValueError(f"{queries} queries and {keys} keys: the queries' own tokens must be among the keys")
    if isinstance(near, Window) and near.stride == 1 and near.dilation == 1 and far is None and core.spec.causal:
        assert isinstance(near.size, int)
        return _band(inputs, near.size)
    _check_choice(far)
    fused = core.fused and isinstance(far, Pyramid) and not far.open
    alone = far is None or (isinstance(far, ByHead) and not (far.groups or far.expansions or far.exact))
    blocks = isinstance(near, Blocks) and alone
    if core.spec.causal and (fused or blocks):
        first: int | Tensor = keys - queries
        if inputs.key_mask is not None:
            inputs, turned = align(inputs)
            first = first - turned
        if fused:
            rows: Tensor = core.far.rows(inputs, first)  # type: ignore[union-attr, operator]
            return rows
        assert isinstance(near, Blocks) and isinstance(near.block, int)
        return multipole_rows(
            inputs.q, inputs.k, inputs.v, first=first, block=near.block, rank=1, key_mask=inputs.key_mask,
            scale=inputs.scale, sinks=0 if far is None else far.sinks, part="near",  # type: ignore[attr-defined]
        )  # fmt: skip
    whole = replace(inputs, q=F.pad(inputs.q, (0, 0, keys - queries, 0)))
    out = core.attend(whole) if inputs.key_mask is None else aligned(core, whole)
    return out[:, :, keys - queries :]


def _check_choice(far: object) -> None:
    """Refuses cells opened by a choice that a later row cannot repeat."""
    pyramids = [pyramid for _, pyramid in far.groups] if isinstance(far, ByHead) else [far]
    opened = [p for p in pyramids if isinstance(p, Pyramid) and p.needs_queries]
    if opened:
        raise ValueError(
            "a step with a cache of keys, in a layer whose cells are opened by a choice that hangs on earlier queries "
            f"(share={max(p.share for p in opened)}, recent={max(p.recent for p in opened)}), and a cache of keys does "
            f"not hold queries. Pass {ARGUMENT}=StreamCache(model) or use_cache=False, or use share=1, recent=0"
        )


def dense_rows(inputs: Inputs, bias: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    """Exact attention of the last tokens, or of another sequence.

    `bias` [B, Hq, Nq, Nk] is added to the scores; tokens of different `segments` [B, N] do not see each other.
    """
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    visible = None if inputs.key_mask is None else inputs.key_mask[:, None, None]
    if inputs.causal and queries > 1:
        device = inputs.q.device
        column = torch.arange(keys, device=device)
        order = column <= torch.arange(keys - queries, keys, device=device)[:, None]
        visible = order if visible is None else visible & order
    if segments is not None:
        alike = segments[:, None, :, None] == segments[:, None, None]
        visible = alike if visible is None else visible & alike
    return _sdpa(inputs.q, inputs.k, inputs.v, visible, inputs.scale, bias)


def _band(inputs: Inputs, size: int) -> Tensor:
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    device, rows = inputs.q.device, []
    for start in range(keys - queries, keys, BAND):
        stop = min(keys, start + BAND)
        oldest = max(0, start - size + 1)
        row = torch.arange(start, stop, device=device)[:, None]
        column = torch.arange(oldest, stop, device=device)
        visible = (column <= row) & (column > row - size)
        if inputs.key_mask is not None:
            visible = visible & inputs.key_mask[:, None, None, oldest:stop]
        query = inputs.q[:, :, start - (keys - queries) : stop - (keys - queries)]
        rows.append(_sdpa(query, inputs.k[:, :, oldest:stop], inputs.v[:, :, oldest:stop], visible, inputs.scale))
    return torch.cat(rows, 2)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float, bias: Tensor | None = None
) -> Tensor:
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    if bias is None:
        mask = visible
    else:
        mask = bias if visible is None else torch.where(visible, bias, float("-inf"))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if visible is not None:
        # Kernels differ on rows that see nothing: some give 0, some the mean of all values.
        out = torch.where(visible.any(-1, keepdim=True), out, torch.zeros_like(out))
    return out
