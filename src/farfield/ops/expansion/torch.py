"""Expansions in torch, on any device: sums of runs of blocks, one after the other."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from farfield.ops.expansion.moments import Moments, moments_of, moments_of_listed, nothing, through
from farfield.ops.expansion.sift import sift
from farfield.ops.listed import attend_lists
from farfield.ops.state import AttentionState, merge_states
from farfield.ops.tiles import Store

__all__ = ["RUN", "attend_cell", "state_by_torch"]

RUN = 16
"""Blocks whose sums are held at once."""


def state_by_torch(
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
    """:func:`expansion_state` in torch, a run of blocks at a time, for the centres ``own``; ``shown`` [B or 1, N]."""
    length, wide = query.shape[2], centres.dtype
    units = -(-length // block)
    joins: Tensor | None = None
    if open:
        # A hidden token may hold anything, and absent ones of a list read some token.
        key, value = (x.masked_fill(~shown[:, None, :, None], 0.0) for x in (key, value))
        kept, joins = sift(key, centres, shown, block=block, open=open, scale=scale, units=units)
    else:
        # What a block sees as far ends two blocks before it: two empty ones in front put it in the block's own place.
        late = max(0, units - 2) * block
        ahead = min(2, units) * block

        def shifted(x: Tensor) -> Tensor:
            return F.pad(x[:, :, :late], (0, 0, ahead, units * block - ahead - late)).unflatten(2, (units, block))

        shown = shifted(shown[:, None, :, None].expand(-1, 1, -1, -1).to(wide)).squeeze(-1) > 0
        # A masked token may hold anything.
        keys, values = (shifted(x).masked_fill(~shown[..., None], 0.0) for x in (key, value))
    laid = F.pad(query.to(wide), (0, 0, 0, units * block - length)).unflatten(2, (units, block))
    chosen = F.pad(own, (0, units * block - length)).unflatten(2, (units, block))
    repeat, outs, scores = query.shape[1] // key.shape[1], [], []
    for of_key in range(key.shape[1]):  # heads of one key head at a time: their sums stay in the cache
        one, heads = slice(of_key, of_key + 1), slice(of_key * repeat, (of_key + 1) * repeat)
        about = centres[heads]
        carry = nothing(laid.new_zeros(query.shape[0], repeat), about)
        out, score = [], []
        for start, stop in pairwise([*range(0, units, RUN), units]):
            run = slice(start, stop)
            if joins is None:
                parts = moments_of(keys[:, one, run], values[:, one, run], about, shown[:, :, run], scale)
            else:
                parts = moments_of_listed(key[:, one], value[:, one], about, joins[:, heads, run], scale)
            found = through(carry, parts)
            carry, far = found[-1], Moments(*(torch.stack(x, 2) for x in zip(*found, strict=True)))
            of_run = attend_cell(laid[:, heads, run], chosen[:, heads, run], far, about, bias[heads].to(wide), scale)
            out.append(of_run[0])
            score.append(of_run[1])
        outs.append(torch.cat(out, 2))
        scores.append(torch.cat(score, 2))
    cell = AttentionState(*(torch.cat(x, 1).flatten(2, 3)[:, :, :length] for x in (outs, scores)))
    if not open:
        return cell
    exact = _read(query.to(wide), key.to(wide), value.to(wide), kept, own, block, scale)
    return merge_states(cell, AttentionState(exact.out, exact.lse.to(wide)))


def _read(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, own: Tensor, block: int, scale: float
) -> AttentionState:
    """Attention of queries [B, H, N, D] to what their centres ``own`` [B, H, N] keep, [B, H, U, C, open]."""
    batch, heads, length, dim = query.shape
    unit = torch.arange(length, device=query.device) // block
    table = kept.flatten(2, 3).gather(2, (unit * kept.shape[3] + own)[..., None].expand(-1, -1, -1, kept.shape[-1]))
    rows = [x.reshape(batch * x.shape[1], -1, 1, dim) for x in (key, value)]
    store = Store(rows[0], rows[1], table.flatten(0, 1))
    units = query.reshape(batch * heads, 1, length, 1, dim)
    state = attend_lists(units, [store], batch=batch, scale=scale)
    return AttentionState(*(x.reshape(batch, heads, length, *x.shape[4:]) for x in state))


def attend_cell(
    query: Tensor, own: Tensor, far: Moments, centres: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, H, U, M, D] and score [B, H, U, M] of queries [B, H, U, M, D] from moments [B, H, U, C]."""
    own = F.one_hot(own, centres.shape[1]).to(query.dtype)
    x = (query - (own.flatten(2, 3) @ centres).unflatten(2, query.shape[2:4])) * scale
    common = (x * (own @ far.key)).sum(-1, keepdim=True)
    # Rows of the query's own centre alone: x times k v', and 1 - x.K times the mean value.
    rows = own[..., None] * torch.cat([x, 1 - common], -1)[..., None, :]
    out = rows.flatten(-2) @ far.rows.flatten(-3, -2)
    lse = far.lse.masked_fill(far.lse == -torch.inf, -1e30)
    score = (own @ lse[..., None] + common).squeeze(-1) + bias[:, None, None]
    return out, score.masked_fill(score < -1e29, -torch.inf)
