"""Tokens that are still on somebody's list, and no others: what decoding keeps where nothing else is read.

A centre of an expansion keeps the tokens with the largest scores, and one that leaves its list never comes back
(:mod:`farfield.ops.expansion`). So decoding needs no token but those on the lists of the heads that read a key head:
their number is bounded by the lengths of the lists, and not by the context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farfield.geometry import EMPTY

__all__ = ["compact"]


@torch.no_grad()
def compact(key: Tensor, value: Tensor, lists: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The rows of keys and values that are on a list, in their order.

    Args:
        key, value: [B, Hkv, N, D].
        lists: for some heads rows [B, H, ...] of these, ``EMPTY`` for none, which become rows of what is returned, in
            place; and [H] the key head that each of the heads reads.

    Returns:
        Keys and values [B, Hkv, M, D], M the most rows that a key head has on its lists, at least 1; where one has
        fewer, any row follows. O(N log N + lists) time.
    """
    batch, kv_heads, rows = key.shape[:3]
    row = torch.arange(batch, device=key.device)[:, None, None]
    wanted = torch.zeros(batch, kv_heads, rows + 1, dtype=torch.bool, device=key.device)  # the last one: of EMPTY
    for kept, read in lists:
        listed = kept.flatten(2)
        wanted[row, read[:, None], torch.where(listed == EMPTY, rows, listed)] = True
    wanted = wanted[..., :rows]
    size = max(1, int(wanted.sum(-1).max())) if wanted.numel() else 1
    order = (~wanted).to(torch.uint8).argsort(stable=True, dim=-1)[..., :size]
    place = wanted.cumsum(-1) - 1
    for kept, read in lists:
        listed = kept.flatten(2)
        moved = place[row, read[:, None], listed.clamp(min=0)]
        kept.copy_(moved.masked_fill_(listed == EMPTY, EMPTY).view_as(kept))
    # Normal tensors even in inference mode: later steps outside of it may write to them.
    with torch.inference_mode(False), torch.no_grad():
        index = order[..., None].expand(-1, -1, -1, key.shape[3])
        return key.gather(2, index), value.gather(2, index)
